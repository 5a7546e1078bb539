"""The loop on a counting algorithm: what is called when, what is written, what stops."""

import functools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import hosts, progress
from educe.training import checkpoint, loop, metrics
from educe.types import Algorithm, Batch, TrainState


class Counter:
  """A data iterator whose state is how many batches it gave. JSON, as Grain's are."""

  def __init__(self):
    self.given = 0

  def get_state(self):
    return {'given': self.given}

  def set_state(self, state):
    self.given = state['given']


def algorithm(data, end=10**9):
  def next_batch(state):
    if data.given >= end:
      raise StopIteration
    data.given += 1
    batch = Batch(np.full((2, 3), data.given, np.int32), np.ones((2, 3), np.float32))
    return batch, {'data/given': data.given}

  return Algorithm(next_batch, None, data, 2)


def step(state, batch, bad=(), nan=()):
  """Params collect the batches seen, so that order and repetition show."""
  number = int(batch.tokens[0, 0])
  values = {'loss': jnp.float32(number), 'skipped_in_a_row': jnp.int32(0)}
  if number in nan:
    values['loss'] = jnp.float32(jnp.nan)
  if number in bad:
    values['skipped_in_a_row'] = jnp.int32(sum(n <= number for n in bad))
  params = state.params * 10 + number
  return TrainState(state.step + 1, params, state.opt_state, state.key), values


def run(tmp_path, steps, *, data=None, end=10**9, bad=(), nan=(), **options):
  data = data or Counter()
  like = TrainState(jnp.int32(0), jnp.float32(0), (), jax.random.key(0))
  manager = checkpoint.open_manager(tmp_path / 'checkpoints', keep=9)
  state = checkpoint.restore(manager, like, data) or like
  out = loop.run(
    state,
    functools.partial(step, bad=bad, nan=nan),
    algorithm(data, end),
    steps=steps,
    run_dir=tmp_path,
    manager=manager,
    config={},
    place=lambda batch, shares: batch,
    log=metrics.Log(tmp_path, step=int(state.step)),
    **options,
  )
  checkpoint.wait(manager)
  manager.close()
  return out


def records(tmp_path):
  return metrics.read(tmp_path / 'metrics.jsonl')


def saved(tmp_path):
  return sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())


def test_every_step_is_written_once_and_the_last_is_saved(tmp_path):
  state, finished = run(tmp_path, 5, save_every=2)
  assert finished
  assert state.params == 12345
  assert [(r['step'], r['loss'], r['data/given']) for r in records(tmp_path)] == [
    (i, i, i) for i in range(1, 6)
  ]
  assert saved(tmp_path) == [2, 4, 5]


def test_mfu_is_of_the_flops_of_each_batch(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, 'peak_flops', lambda: 50.0)
  run(tmp_path, 2, flops=lambda batch: 100.0 * int(batch.tokens[0, 0]))
  for number, line in enumerate(metrics.read(tmp_path / 'metrics.jsonl'), 1):
    seconds = line['timing/step_seconds']
    assert line['perf/mfu'] == pytest.approx(100 * number / seconds / 50)


def test_evaluation_runs_before_during_and_after(tmp_path):
  def evaluate(state):
    return {'accuracy': float(state.params)}

  run(tmp_path, 5, evaluate=evaluate, evaluate_every=2)
  seen = [(r['step'], r['accuracy']) for r in records(tmp_path) if 'accuracy' in r]
  assert seen == [(0, 0), (2, 12), (4, 1234), (5, 12345)]


def test_evaluate_every_0_means_only_before_and_after(tmp_path):
  run(tmp_path, 3, evaluate=lambda state: {'accuracy': float(state.params)})
  seen = [(r['step'], r['accuracy']) for r in records(tmp_path) if 'accuracy' in r]
  assert seen == [(0, 0), (3, 123)]


def test_a_run_goes_on_where_it_was_saved(tmp_path):
  run(tmp_path, 3)
  state, _ = run(tmp_path, 6)
  assert state.params == 123456
  assert [r['step'] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]

  # A run that is already there trains no further …
  def evaluate(state):
    return {'accuracy': 1.0}

  for _ in range(2):  # … but what was never evaluated is, once
    again, finished = run(tmp_path, 6, evaluate=evaluate)
    assert finished
    assert again.params == 123456
    assert [r['step'] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 6]


def test_sigterm_saves_at_the_next_boundary_and_says_so(tmp_path):
  class Stopper(Counter):
    def get_state(self):
      return super().get_state()

  data = Stopper()

  def place(batch, shares=1):
    if batch.tokens[0, 0] == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch

  before = signal.getsignal(signal.SIGTERM)
  like = TrainState(jnp.int32(0), jnp.float32(0), (), jax.random.key(0))
  manager = checkpoint.open_manager(tmp_path / 'checkpoints')
  state, finished = loop.run(
    like,
    step,
    algorithm(data),
    steps=9,
    run_dir=tmp_path,
    manager=manager,
    config={},
    place=place,
    log=metrics.Log(tmp_path),
    save_every=100,
  )
  checkpoint.wait(manager)
  manager.close()
  assert not finished
  assert saved(tmp_path) == [3]
  assert [r['step'] for r in records(tmp_path)] == [1, 2, 3]
  assert signal.getsignal(signal.SIGTERM) == before  # the caller's handler is back
  state, finished = run(tmp_path, 5)
  assert finished
  assert state.params == 12345


def test_endless_nonfinite_gradients_abort_and_leave_the_batch(tmp_path):
  with pytest.raises(loop.NonFinite, match=r'3 steps in a row, up to step 4.*npz'):
    run(tmp_path, 9, bad=(2, 3, 4), abort_after=3)
  dumped = np.load(tmp_path / 'nonfinite_4.npz', allow_pickle=False)
  np.testing.assert_array_equal(dumped['tokens'], np.full((2, 3), 4))
  assert records(tmp_path)[-1]['step'] == 4  # the evidence is in the metrics too


def test_a_first_loss_that_is_not_finite_aborts_at_once(tmp_path):
  with pytest.raises(
    loop.NonFinite, match=r'loss nan .*before any update.*config.model'
  ):
    run(tmp_path, 9, bad=(1,), nan=(1,))
  assert [r['step'] for r in records(tmp_path)] == [1]
  assert (tmp_path / 'nonfinite_1.npz').exists()
  assert saved(tmp_path) == []


def test_a_first_update_that_is_skipped_with_a_finite_loss_is_let_pass(tmp_path):
  assert run(tmp_path, 9, bad=(1,))[1]


def test_a_loss_of_nothing_is_no_reason_to_abort(tmp_path):
  """0 of 0 tokens trained: the loss is NaN, the gradients are 0, nothing is skipped."""
  assert run(tmp_path, 4, nan=(1, 2, 3, 4))[1]


@pytest.mark.parametrize('steps', [1, 3])
def test_a_run_shorter_than_abort_after_does_not_end_as_done(tmp_path, steps):
  bad = tuple(range(1, steps + 1))
  with pytest.raises(loop.NonFinite, match=f'up to step {steps}: look at config.model'):
    run(tmp_path, steps, bad=bad, abort_after=10)


def test_skipped_updates_at_the_end_of_a_longer_run_do_not_undo_it(tmp_path):
  assert run(tmp_path, 5, bad=(3, 4, 5), abort_after=4)[1]


@pytest.mark.parametrize('asks', [True, False])
def test_the_time_of_a_batch_is_the_steps_unless_the_policy_was_asked(tmp_path, asks):
  data = Counter()
  plain = algorithm(data)

  def slow(state):
    time.sleep(0.3 if data.given % 2 else 0.0)
    return plain.next_batch(state)

  like = TrainState(jnp.int32(0), jnp.float32(0), (), jax.random.key(0))
  manager = checkpoint.open_manager(tmp_path / 'checkpoints')
  method = plain._replace(next_batch=slow, asks_policy=asks)
  loop.run(
    like, step, method, steps=6, run_dir=tmp_path, manager=manager, config={},
    place=lambda batch, shares: batch, log=metrics.Log(tmp_path),
  )  # fmt: skip
  checkpoint.wait(manager)
  manager.close()
  seconds = [r['timing/step_seconds'] for r in records(tmp_path)]
  assert sum(seconds) < 0.5 if asks else sum(seconds) > 0.85
  assert min(seconds) >= 0


def test_the_first_step_and_evaluations_are_left_out_of_the_bars_rate(
  tmp_path, monkeypatch
):
  """The first compiles: an ETA from it would frighten off whoever looks."""
  bars = []
  make = progress.steps
  monkeypatch.setattr(progress, 'steps', lambda *a: bars.append(make(*a)) or bars[-1])

  def slow(batch, shares=1):
    if batch.tokens[0, 0] == 1:
      time.sleep(1.5)
    return batch

  def evaluate(state):
    time.sleep(0.5)
    return {'accuracy': 0.0}

  like = TrainState(jnp.int32(0), jnp.float32(0), (), jax.random.key(0))
  manager = checkpoint.open_manager(tmp_path / 'checkpoints')
  loop.run(
    like, step, algorithm(Counter()), steps=3, run_dir=tmp_path, manager=manager,
    config={}, place=slow, log=metrics.Log(tmp_path), evaluate=evaluate,
  )  # fmt: skip
  checkpoint.wait(manager)
  manager.close()
  (bar,) = bars
  assert (bar.n, bar.initial) == (3, 1)
  rate = bar.format_dict['rate']
  assert rate is None or rate > 1


def test_data_that_end_too_early_say_where(tmp_path):
  with pytest.raises(ValueError, match=r'ended before step 4 of 9; raise data.epochs'):
    run(tmp_path, 9, end=3)
  assert records(tmp_path)[-1]['step'] == 3


@pytest.mark.parametrize(
  ('failing', 'kind'), [(1, ValueError), (4, ValueError), (4, ConnectionError)]
)
def test_a_batch_that_cannot_be_made_costs_no_update(tmp_path, failing, kind):
  """A judge is down at step 4: what the three before it learned is saved, and goes on."""

  class Failing(Counter):
    down = True

  data = Failing()
  honest = algorithm

  def flaky(data, end):
    method = honest(data, end)

    def next_batch(state):
      if data.given + 1 == failing and data.down:
        raise kind('the judge is down')
      return method.next_batch(state)

    return method._replace(next_batch=next_batch)

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(globals(), 'algorithm', flaky)
    with pytest.raises(kind, match='the judge is down'):
      run(tmp_path, 6, data=data)
    steps = [
      int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()
    ]
    assert steps == ([] if failing == 1 else [failing - 1])
    assert [r['step'] for r in records(tmp_path)] == list(range(1, failing))
    after = Failing()
    after.down = False
    state, finished = run(tmp_path, 6, data=after)
  assert finished
  assert int(state.params) == 123456


def test_an_error_of_one_process_alone_asks_nothing_of_the_others(tmp_path):
  """To save would take all of them, and they do not know."""
  data = Counter()

  def broken(data, end):
    method = real(data, end)

    def next_batch(state):
      if data.given == 3:
        raise hosts.Alone('stale file handle')
      return method.next_batch(state)

    return method._replace(next_batch=next_batch)

  real = algorithm
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(globals(), 'algorithm', broken)
    with pytest.raises(hosts.Alone, match='stale file handle'):
      run(tmp_path, 6, data=data)
  assert not [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert [r['step'] for r in records(tmp_path)] == [1, 2, 3]


def test_of_several_processes_all_stop_where_it_was_agreed(tmp_path, monkeypatch):
  asked = []

  def stopping():
    asked.append(1)
    return len(asked) == 4

  before = signal.getsignal(signal.SIGTERM)
  monkeypatch.setattr(loop.hosts, 'stopping', stopping)
  monkeypatch.setattr(loop.hosts, 'exchange', lambda value: [value])
  with monkeypatch.context() as patch:
    patch.setattr(loop.hosts, 'count', lambda: 2)
    stop, handler = loop.catch_sigterm()
    assert (stop, handler) == (stopping, None)
    assert signal.getsignal(signal.SIGTERM) is before  # JAX has its own
  monkeypatch.setattr(loop, 'catch_sigterm', lambda: (stopping, None))
  state, finished = run(tmp_path, 9)
  assert not finished
  assert int(state.step) == 4
  assert len(asked) == 4  # once a step
  assert (tmp_path / 'checkpoints' / '4').is_dir()


def test_a_stop_at_the_last_step_leaves_its_evaluation_to_the_next_start(
  tmp_path, monkeypatch
):
  def evaluate(state):
    return {'accuracy': float(state.params)}

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'catch_sigterm', lambda: (lambda: True, None))
    _, finished = run(tmp_path, 1, evaluate=evaluate)
  assert not finished  # there may be no time for it
  assert saved(tmp_path) == [1]
  _, finished = run(tmp_path, 1, evaluate=evaluate)
  assert finished
  seen = [(r['step'], r['accuracy']) for r in records(tmp_path) if 'accuracy' in r]
  assert seen == [(0, 0), (1, 1)]
