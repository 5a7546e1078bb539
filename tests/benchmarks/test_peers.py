"""What the table beside the peers is made of: tokens, FLOPs, medians, and a judge."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def peers(scripts):
  return scripts(HERE, 'peers')['peers']


def products(a, length, scored, start=0):
  """FLOPs of a row's tokens start … length − 1, token by token: 2 a weight that it is
  multiplied with, and of every head h numbers with each key that is there, and value."""
  layer = a.dim * a.head_dim * (2 * a.heads + 2 * a.kv_heads) + 3 * a.dim * a.ffn
  total = 2 * a.dim * a.vocab_size * scored
  for place in range(start, length):
    total += 2 * a.layers * layer
    total += a.layers * a.heads * 2 * (2 * a.head_dim) * (place + 1)
  return total


@pytest.mark.parametrize('vocabulary', [4096, 32768])
def test_work_is_that_of_every_token_once(peers, vocabulary):
  a = peers.architecture(vocabulary)
  prompt, rest = products(a, 64, 0), products(a, 256, 192, start=64)
  # The table halves T², where T·(T + 1) pairs are halved: a T-th of a small part.
  near = dict(rel=1e-3)

  def said(case):
    rows, tokens = (16, 16 * 256) if case == 'dpo' else (8, 8 * 256)
    prompts = 1 if case == 'grpo' else 8
    # A reference reads both sides of 8 pairs, and has no backward pass.
    passes = 4 if case == 'dpo' else 3
    flops = passes * (prompts * prompt + rows * rest)
    return tokens, pytest.approx(flops, **near)

  for case in ('sft', 'dpo', 'grpo'):
    assert peers.work(case, a) == said(case)
  # The prompt says the first token; the last is drawn, and read by nobody.
  drawn = products(a, 64, 1) + products(a, 64 + 127, 127, start=64)
  for rows in (8, 64):
    tokens, flops = peers.work(f'generate_{rows}', a)
    assert tokens == rows * 128
    assert flops == pytest.approx(rows * drawn, **near)


class Told:
  """A side that says what it is told to."""

  def __init__(self, name, seconds, values, product=0.5):
    self.name, self.runs = name, iter(zip(seconds, values, strict=True))
    self.product = product

  def ask(self, request):
    if request.startswith('prepare'):
      return {}
    if request == 'matmul':
      return {'wall': 1e9, 'cpu': self.product, 'value': 0.0}
    cpu, value = next(self.runs)
    return {'wall': cpu / 2, 'cpu': cpu, 'value': value}


def test_rates_are_of_medians_after_what_compiles(peers):
  a = peers.architecture(4096)
  losses = [3.0, 2.5, 2.0, 1.5, 1.0]
  sides = [
    Told('ours', [90, 80, 2, 9, 1], losses),
    Told('trl', [90, 80, 4, 4, 30], [x + 5e-5 for x in losses], product=0.25),
  ]
  found = peers.measure('dpo', sides, a, 3)
  tokens, flops = peers.work('dpo', a)
  ours, trl = found['ours'], found['trl']
  assert (ours['cpu_s'], ours['wall_s'], trl['cpu_s']) == (2, 1, 4)
  assert ours['tokens_per_cpu_second'] == tokens / 2
  assert ours['tokens_per_second'] == tokens
  assert ours['fraction_of_matmul'] == pytest.approx(flops / 2 / (2 * 2048**3 / 0.5))
  assert trl['fraction_of_matmul'] == pytest.approx(flops / 4 / (2 * 2048**3 / 0.25))
  assert peers.ratios(found) == {'vs_trl': 2.0}
  assert found['loss_difference'] == pytest.approx(5e-5)


@pytest.mark.parametrize(('case', 'off'), [('sft', 2e-4), ('generate_8', 1)])
def test_sides_that_do_not_do_the_same_are_refused(peers, case, off):
  """Losses further apart than 1e-4; a completion that ended early. In any one run."""
  a = peers.architecture(4096)
  value = float(peers.work(case, a)[0]) if off == 1 else 2.0
  right, wrong = [value] * 3, [value, value - off, value]
  sides = [Told('ours', [1] * 3, right), Told('tunix', [1] * 3, wrong)]
  with pytest.raises(AssertionError):
    peers.measure(case, sides, a, 1)
