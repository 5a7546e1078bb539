import json

import pytest

from educe.training import metrics


def test_records_come_back_as_written(tmp_path):
  log = metrics.Log(tmp_path)
  log.write(1, {'loss': 2.5, 'name': 'é'})
  log.write(2, {'loss': float('nan')})
  log.close()
  assert metrics.read(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 2.5, 'name': 'é'},
    {'step': 2, 'loss': None},
  ]
  for line in (tmp_path / 'metrics.jsonl').read_text().splitlines():
    json.loads(line, parse_constant=pytest.fail)  # strict JSON: no NaN


def test_resuming_drops_what_came_after_the_checkpoint_and_a_torn_line(tmp_path):
  log = metrics.Log(tmp_path)
  for step in range(5):
    log.write(step, {'loss': step / 2})
  with log.path.open('a') as file:
    file.write('{"step": 5, "lo')
  log = metrics.Log(tmp_path, step=2)
  log.write(3, {'loss': 9.0})
  steps = [record['step'] for record in metrics.read(log.path)]
  assert steps == [0, 1, 2, 3]
  assert metrics.read(log.path)[-1]['loss'] == 9.0


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
  metrics.Log(tmp_path).write(0, {'accuracy': 0.5})
  assert metrics.read(metrics.Log(tmp_path).path) == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
  log = metrics.Log(tmp_path, tensorboard=True)
  log.write(3, {'loss': 1.25})
  log.close()
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'loss' in events.read_bytes()


def test_the_matmul_rate_is_a_rate():
  rate = metrics.measured_matmul_flops(size=256, repeats=1)
  assert 1e8 < rate < 1e14


def test_all_processes_know_what_was_evaluated_and_the_first_writes(
  tmp_path, as_processes
):
  """Or some of them would evaluate, and wait for the others."""
  log = metrics.Log(tmp_path)
  log.write(2, {'accuracy': 0.5})
  log.write(3, {'loss': 0.5})

  def run(index):
    log = metrics.Log(tmp_path, step=3)
    log.write(4, {'loss': float(index)})
    return log.evaluated

  assert as_processes(2, run) == [{2}, {2}]
  assert metrics.read(tmp_path / 'metrics.jsonl')[-1] == {'step': 4, 'loss': 0.0}
