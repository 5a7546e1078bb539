"""What the small benchmarks say of the seconds that they took, by a clock that is told."""

import dataclasses
import itertools
import json
import pathlib
import sys
import types

import jax
import pytest

from educe.models import policy, presets

HERE = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def of(scripts):
  return scripts(HERE, 'logprob', 'rollout', 'shared_prompts', 'timing', 'train_step')


@pytest.fixture
def last_line(of, monkeypatch, capsys):
  """run(name, *flags) -> its JSON; a look at the clock is each time later than before."""

  def run(name, *flags):
    seconds = itertools.accumulate(itertools.count(1))
    clock = types.SimpleNamespace(
      perf_counter=lambda: float(next(seconds)),
      process_time=lambda: 0.0,
      strftime=lambda _: 'today',
    )
    monkeypatch.setattr(of['timing'], 'time', clock)
    monkeypatch.setattr(sys, 'argv', [name, *flags])
    of[name].main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  return run


def test_a_shared_prompt_counts_the_tokens_of_the_rows(last_line):
  flags = 'prompt=64 completion=16 group=4 dim=64 layers=1 vocab=50 repeats=1'
  found = last_line('shared_prompts', *(f'--{flag}' for flag in flags.split()))
  whole, shared = found['ways']['whole rows'], found['ways']['shared']
  for row in (whole, shared):
    assert row['tokens_per_second'] == round(4 * 80 / row['wall_s'])
  assert found['speedup'] == pytest.approx(whole['wall_s'] / shared['wall_s'], abs=1e-3)
  assert found['loss_difference'] < 1e-5
  assert found['gradient_difference'] < 1e-5


def test_three_products_over_a_way_is_its_fraction(last_line):
  # Large enough for a tenth of a GFLOP/s, the last digit that is printed.
  N, D, V = 512, 64, 4096
  flags = (f'--tokens={N}', f'--width={D}', f'--vocab={V}', '--repeats=1')
  found = last_line('logprob', *flags)
  ways = found['ways']
  least = ways['matmul']['wall_s']
  for row in ways.values():
    assert row['fraction_of_matmul'] == pytest.approx(least / row['wall_s'], abs=1e-3)
  assert len({row['fraction_of_matmul'] for row in ways.values()}) == len(ways)
  gflops = 3 * 2 * N * D * V / least / 1e9
  assert found['matmul_gflops'] == pytest.approx(gflops, abs=0.051)


def test_a_step_is_six_flops_a_weight_and_token(of, last_line, monkeypatch):
  small = types.SimpleNamespace(smollm2_135m=presets.debug)
  monkeypatch.setattr(of['train_step'], 'presets', small)
  rates = iter([1e9, 3e9, 2e9])
  monkeypatch.setattr(
    of['train_step'], 'measured_matmul_flops', lambda repeats: next(rates)
  )
  found = last_line('train_step', '--rows=2', '--length=16', '--steps=2')
  took = found['seconds']['step (with AdamW)']
  flops = 6 * policy.count(policy.shapes(presets.debug)) * 2 * 16
  assert found['tokens_per_second'] == pytest.approx(32 / took)
  assert found['fraction_of_matmul_peak'] == pytest.approx(flops / took / 3e9)
  assert found['fraction_of_mean_matmul'] == pytest.approx(flops / took / 2e9)


@pytest.mark.parametrize('tied', [False, True])
def test_a_decode_step_reads_its_weights_and_cache_once(of, tied):
  a = dataclasses.replace(presets.debug, tied=tied)
  model, rows, places = policy.build(a), 3, 40
  params = policy.shapes(a)
  read, flops = of['rollout'].step_cost(model, params, rows, places)
  cache = jax.eval_shape(lambda: model.init_cache(rows, places))
  held = sum(4 * x.size for x in jax.tree.leaves(cache.layers))
  weights = policy.count(params)
  if not a.tied:  # of the embedding a step reads a few rows
    weights -= a.vocab_size * a.dim
  assert read == 4 * weights + held
  keys = rows * places * a.layers * a.heads * a.head_dim
  assert flops == 2 * rows * weights + 2 * 2 * keys  # q·k, and weights·v


def test_what_follows_an_end_is_no_token(of):
  """Of completions of unequal lengths, those drawn are counted, and not their room."""
  model = policy.build(presets.debug)
  params = model.init(jax.random.key(0))
  args = types.SimpleNamespace(rows=2, prompt=4, tokens=12, repeats=1)
  found = of['rollout'].unequal_lengths(model, params, args)
  assert found['tokens'] == found['mean_length'] * 8
  assert 8 < found['tokens'] < 8 * 12
  seconds = found['tokens'] / found['static_tokens_per_second']
  again = found['tokens'] / found['continuous_tokens_per_second']
  assert found['speedup'] == pytest.approx(seconds / again)
