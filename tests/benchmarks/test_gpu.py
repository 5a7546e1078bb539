"""The GPU list at its tiny size: each part runs; what it says is right and can fail."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def of(scripts):
  return scripts(
    HERE, 'gpu', 'gpu_parts', 'gpu_sizes', 'logprob', 'rollout', 'step_work'
  )


@pytest.fixture(scope='module')
def tiny(of):
  return of['gpu_sizes'].SIZES['tiny']


@pytest.fixture(scope='module')
def hot(of, tiny):
  return of['gpu_parts'].logprob_part(tiny, 'qwen3_0.6b')


def test_every_way_of_the_log_prob_is_right_and_counted_by_the_formula(of, tiny, hot):
  N, D, V = hot['shape']
  rows = {name: row for name, row in hot['rows'].items() if 'skipped' not in row}
  ours = {name for name in rows if not name.startswith('matmul')}
  assert ours == {
    *(f'{op}, {way}' for op in ('full logits', 'reference', 'chunked 16', 'chunked 32')
      for way in ('forward', 'forward + backward')),
    *(f'one_pass {rows}, forward + backward' for rows in tiny.chunks),
  }  # fmt: skip
  rate = 2 * N * D * V / rows['matmul, forward']['seconds']
  for name, row in rows.items():
    products = 3 if name.endswith('backward') else 1
    least = products * 2 * N * D * V / rate
    assert row['of_ceiling'] == pytest.approx(least / row['seconds'])
    assert row['tflops'] * 1e12 == pytest.approx(
      products * 2 * N * D * V / row['seconds']
    )
    if name in ours and name.endswith('backward'):
      # float32 sums of bfloat16 logits' gradients: see verdicts.
      assert row['entropy_error'] < 1e-5
      assert 0 < max(row['d_hidden_error'], row['d_head_error']) < 2**-6
      assert row['logp_error'] < 1e-5
  # A tile is smaller than all logits, and the compiler says so.
  temporaries = {name: row['temp_mb'] for name, row in rows.items()}
  assert temporaries['chunked 16, forward'] < temporaries['chunked 32, forward']
  assert temporaries['chunked 16, forward'] < temporaries['reference, forward']


def test_float64_tells_a_wrong_log_prob_and_a_wrong_gradient(of):
  parts = of['gpu_parts']
  keys = jax.random.split(jax.random.key(3), 4)
  hidden = jax.random.normal(keys[0], (12, 8))
  head = jax.random.normal(keys[1], (8, 30))
  targets = jax.random.randint(keys[2], (12,), 0, 30)
  at = np.array([2, 3, 7])
  worth = jnp.zeros(12).at[at].set(jax.random.normal(keys[3], (3,)))
  exact = parts.in_float64(hidden, head, targets, worth, at)
  scores, gradients = parts.backward(parts.reference.logprob)(
    hidden, head, targets, worth
  )
  right = parts.errors(scores, gradients, exact, at)
  assert max(right.values()) < 1e-5
  off = scores._replace(logp=scores.logp.at[7].add(0.01))
  assert parts.errors(off, gradients, exact, at)['logp_error'] > 0.009
  late = gradients[0], gradients[1].at[:, 29].add(0.1)
  assert parts.errors(scores, late, exact, at)['d_head_error'] > 0.01


def test_what_is_skipped_says_why(hot, tiny, of):
  assert hot['rows']['pallas_gpu, forward'] == {'skipped': 'there is no GPU'}
  if importlib.util.find_spec('torch') is None:
    assert hot['torch'] == {'skipped': 'torch is not installed'}
    assert 'torch skipped: torch is not installed' in of['gpu'].table('hot', hot)


def test_a_way_that_does_not_run_is_a_row(of, tiny, monkeypatch):
  def broken(*operands):
    raise RuntimeError('RESOURCE_EXHAUSTED\nand more')

  parts = of['gpu_parts']
  monkeypatch.setattr(
    parts, 'operations', lambda size: {'full logits': parts.full_logits, 'ours': broken}
  )
  monkeypatch.setattr(parts, 'one_passes', lambda size: {})
  rows = parts.logprob_part(tiny, 'llama3_8b')['rows']
  assert rows['ours, forward'] == {'skipped': 'RuntimeError: RESOURCE_EXHAUSTED'}
  assert rows['full logits, forward']['seconds'] > 0


def test_training_steps_are_counted_and_learn_from_the_right_start(of, tiny):
  found = of['gpu_parts'].train_part(tiny, '1b')
  assert found['tokens'] == 64
  for row in found['rows'].values():
    assert row['mfu'] == pytest.approx(
      found['flops'] / row['seconds'] / found['peak_flops']
    )
    assert row['tokens_per_second'] == pytest.approx(64 / row['seconds'])
  # Untrained: all tokens are about as likely.
  vocabulary = tiny.models['1b'].vocab_size
  assert abs(found['rows']['sft']['loss'] - np.log(vocabulary)) < 0.2


def test_decoding_stands_beside_its_bounds(of, tiny):
  found = of['gpu_parts'].decode_part(tiny, '135m')
  for many in tiny.batches:
    row = found['rows'][f'{many} rows']
    assert row['tokens_per_second'] == pytest.approx(many / row['seconds'])
    bound = max(row['memory_bound_seconds'], row['matmul_bound_seconds'])
    assert row['of_bound'] == pytest.approx(bound / row['seconds'])
  few, more = (found['rows'][f'{many} rows'] for many in tiny.batches)
  assert more['matmul_bound_seconds'] == pytest.approx(2 * few['matmul_bound_seconds'])


def test_the_science_says_what_it_lacks(of, tiny, monkeypatch, tmp_path):
  parts = of['gpu_parts']
  monkeypatch.setattr(
    parts.importlib.util, 'find_spec', lambda name: None if name == 'grain' else name
  )
  assert parts.science(tiny, 0, tmp_path) == {'skipped': 'not installed: grain'}


@pytest.mark.parametrize(
  ('change', 'claim'),
  [
    (('logprob-llama3_8b', 'pallas_gpu, forward', 'of_ceiling', 0.84), 'forward at'),
    (('logprob-llama3_8b', 'one_pass 4096, forward + backward', 'seconds', 0.13), '1.15'),
    (('logprob-llama3_8b', 'one_pass 4096, forward + backward', 'temp_mb', 3001), '1.15'),
    (('logprob-llama3_8b', 'one_pass 4096, forward + backward', 'd_head_error', 0.1),
     'float64'),
    (('train-1b', 'sft', 'mfu', 0.44), 'MFU'),
  ],
)  # fmt: skip
def test_each_verdict_can_fail(of, change, claim):
  def row(seconds, temp_mb, **more):
    return dict(seconds=seconds, temp_mb=temp_mb, of_ceiling=0.022 / seconds, **more)

  error = dict(
    logp_error=1e-5, entropy_error=1e-5, d_hidden_error=4e-3, d_head_error=4e-3
  )
  found = {
    'logprob-llama3_8b': {
      'rows': {
        'matmul, forward': row(0.022, 0),
        'full logits, forward': row(0.03, 8000),
        'full logits, forward + backward': row(0.1, 12000, **error),
        'pallas_gpu, forward': row(0.024, 100),
        'pallas_gpu, forward + backward': {'skipped': 'another jax'},
        'one_pass 4096, forward + backward': row(0.11, 3000, **error),
      }
    },
    'train-1b': {'rows': {'sft': {'mfu': 0.46}}},
  }
  judged = of['gpu'].verdicts(found)
  assert [held for _, held, _ in judged] == [True] * 4
  part, name, key, value = change
  found[part]['rows'][name][key] = value
  failed = [words for words, held, _ in of['gpu'].verdicts(found) if not held]
  assert len(failed) == 1
  assert claim in failed[0]


def test_nothing_measured_is_nothing_judged(of):
  assert {held for _, held, _ in of['gpu'].verdicts({})} == {None}


def test_a_part_that_is_there_is_not_run_again(of, tmp_path, capsys):
  """The whole command, in processes of its own."""
  arguments = ['--size=tiny', '--parts=ceilings', f'--out={tmp_path}']
  assert of['gpu'].main(arguments) == 0
  first = json.loads(capsys.readouterr().out.splitlines()[-1])
  kept = tmp_path / 'ceilings.json'
  found = json.loads(kept.read_text())
  assert first['parts'] == {'ceilings': found}
  rate = found['rows']['matmul llama3_8b']
  flops = 2 * np.prod(rate['shape'], dtype=float)
  assert rate['tflops'] * 1e12 == pytest.approx(flops / rate['seconds'])
  copy, size = found['rows']['copy'], of['gpu_sizes'].SIZES['tiny']
  both = 2 * size.copied  # bytes read, and bytes written
  assert copy['gb_per_second'] * 1e9 == pytest.approx(both / copy['seconds'])
  found['rows']['copy']['seconds'] = 123.0
  kept.write_text(json.dumps(found))
  assert of['gpu'].main(arguments) == 0
  again = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert again['parts']['ceilings']['rows']['copy']['seconds'] == 123.0
  with pytest.raises(SystemExit):  # another size's results are not taken for these
    of['gpu'].main(['--size=h200', *arguments[1:]])


def test_a_part_that_fails_or_hangs_fails_alone(of, monkeypatch, tmp_path, capsys):
  gpu = of['gpu']
  env = dict(PATH='')
  assert gpu.within(30, [sys.executable, '-c', 'raise ValueError("no")'], env) == (
    'ValueError: no'
  )
  sleep = [sys.executable, '-c', 'import time; time.sleep(60)']
  assert gpu.within(1, sleep, env) == 'took more than 1 s'
  monkeypatch.setattr(gpu, 'within', lambda *_: 'ValueError: no')
  assert gpu.main(['--size=tiny', '--parts=ceilings', f'--out={tmp_path}']) == 1
  said = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert said['failed'] == {'ceilings': 'ValueError: no'}


def test_it_imports_no_more_than_the_gpu_machine_has():
  """A bare environment of jax, flax, optax, NumPy, jaxtyping and tqdm is enough."""
  code = """
import sys
class Missing:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {'grain', 'ml_collections', 'gguf', 'reasoning_gym', 'orbax',
                              'tensorflow_datasets', 'tokenizers', 'torch', 'libtpu',
                              'transformers', 'beartype', 'cloudpickle', 'math_verify'}:
      raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import gpu
print(len(gpu.parts(gpu.SIZES['h200'], None)))
"""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True
  )
  assert done.stdout.split() == ['10'], done.stderr
