"""Exact chances are what the model and the environment say; every criterion can fail."""

import copy
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.data import tokenizer as tokenizers
from educe.environments import chain
from educe.models import policy, presets

HERE = pathlib.Path(__file__).parents[2] / 'experiments' / '2025_yue_pass_at_k'
WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')


@pytest.fixture(scope='module')
def of(scripts):
  return scripts(HERE, 'analysis', 'exact', 'judge', 'run', 'tables')


@pytest.fixture(scope='module')
def base():
  """An untrained model, which says everything with a chance of its own."""
  model = policy.build(presets.get('chain'))
  model = model._replace(axes=None, architecture=None, values=None)  # hashable
  return model, jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def hidden(model, params, tokens):
  return model.hidden(params, tokens)[0]


def next_logp(model, params, tokens, temperature=1.0):
  """log p of every next token, `[V]`, from logits and float64."""
  padded = [
    *tokens,
    *[0] * (8 - len(tokens)),
  ]  # one shape; what comes later is not seen
  states = hidden(model, params, jnp.asarray([padded]))
  head = model.head(params)
  assert head.softcap is None
  last = np.asarray(states[0, len(tokens) - 1] * head.scale, np.float64)
  logits = last @ np.asarray(head.matrix)
  logits = logits / temperature
  return logits - np.logaddexp.reduce(logits)


def spelled(model, params, prompt, response, temperature=1.0):
  tokens, total = list(prompt), 0.0
  for token in response:
    total += next_logp(model, params, tokens, temperature)[token]
    tokens.append(token)
  return total


@pytest.mark.parametrize('temperature', [1.0, 0.5])
def test_the_chance_of_the_right_response_is_a_product_of_next_tokens(
  of, base, temperature
):
  (stop,) = WORDS.eos_ids
  for part in ('trained', 'deeper', 'single'):
    records = of['exact'].prompt_sets()[part][:3]
    got = of['exact'].right_logp(*base, WORDS, records, temperature=temperature)
    want = [
      spelled(
        *base,
        WORDS.encode(x['prompt']),
        [*WORDS.encode(x['answer']), stop],
        temperature,
      )
      for x in records
    ]
    np.testing.assert_allclose(got, want, atol=1e-4)  # float32, sums of tens of nats


def test_all_responses_are_a_distribution_whose_right_one_the_environment_pays(
  of, base
):
  (stop,) = WORDS.eos_ids
  records = of['exact'].prompt_sets()['trained'][:3]
  p, correct = of['exact'].distribution(*base, WORDS, records)
  np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)
  logp = of['exact'].right_logp(*base, WORDS, records)
  np.testing.assert_allclose((p * correct).sum(-1), np.exp(logp), rtol=1e-4)
  # What has ended is one response, with all of its mass.
  cube, prompt = p.reshape(3, 16, 16, 16)[1], WORDS.encode(records[1]['prompt'])
  np.testing.assert_allclose(
    cube[stop].sum(), np.exp(next_logp(*base, prompt)[stop]), rtol=1e-4
  )
  np.testing.assert_allclose(
    cube[5, stop].sum(), np.exp(spelled(*base, prompt, [5, stop])), rtol=1e-4
  )
  assert np.count_nonzero(cube[stop]) == np.count_nonzero(cube[5, stop]) == 1
  respond = chain.make(depth=2, part='train').respond
  (at,) = np.flatnonzero(correct[1])
  for response in (at, at + 1, at + 16, at - 256):
    tokens = [int(x) for x in np.unravel_index(response, (16, 16, 16))]
    ended = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
    turn = respond(records[1], [WORDS.decode(ended, skip_special=True)])
    # What goes on past a right trace is cut off, and wrong.
    assert (turn.reward == 1.0) == (correct[1, response] == 1)


def test_a_crossing_is_one_turn(of):
  once = of['analysis'].crosses_once
  assert once(np.array([0.2, 0.1, -0.1, -1e-9]))
  assert once(np.array([0.2, -0.1, 1e-14]))  # in the end both are certain
  for no in ([0.2, 0.1, 0.0], [-0.1, 0.2], [0.2, -0.1, 0.1], [0.2, 0.0, -0.1], [-0.1]):
    assert not once(np.array(no))


def test_a_tilt_multiplies_all_odds_by_one_factor(of):
  p0 = np.array([0.5, 1e-2, 1e-6, 1e-30])
  tilted = np.exp(of['analysis'].tilt(np.log(p0), 0.6))
  assert tilted.mean() == pytest.approx(0.6, abs=1e-9)
  factor = tilted / -np.expm1(np.log(tilted)) * (1 - p0) / p0
  np.testing.assert_allclose(factor, factor[0], rtol=1e-8)


def test_errors_are_in_units_of_what_sampling_does(of):
  rng = np.random.default_rng(0)
  p = rng.uniform(0.001, 0.3, 20)
  draws = [
    of['judge'].errors(
      {'samples': [32] * 20, 'correct': rng.binomial(32, p).tolist()}, np.log(p)
    )
    for _ in range(400)
  ]
  # Of 400 draws of a standard normal: mean ± 0.05, standard deviation ± 0.035.
  np.testing.assert_allclose(np.mean(draws, 0), 0, atol=0.2)
  np.testing.assert_allclose(np.std(draws, 0), 1, atol=0.15)


def world(seed=0):
  """Results as they would be where RL lifts most prompts and drops some."""
  rng = np.random.default_rng(seed)

  def run(exposure, number):
    sizes = {'trained': 60, 'heldout': 30, 'deeper': 10, 'single': 8}
    parts = {}
    for part, size in sizes.items():
      before = math.log(max(exposure, 1e-7)) + rng.uniform(-0.1, 0.1, size)
      after = np.full(size, math.log(0.999))
      after[: size // 12] = before[: size // 12] - math.log(50)
      if not exposure:
        after = before.copy()
      parts[part] = {'base': before.tolist(), 'rl': after.tolist()}
    null = {'first': [2 * exposure] * 30, 'rate': [2 * exposure]}
    return {
      'exposure': exposure,
      'seed': number,
      'group': 16,
      'visits': 30.0,
      'logp': parts,
      'others': list(range(30, 60)),
      'power': null,
      'tempered': null,
    }

  runs = [run(exposure, n) for exposure in (0.01, 0.03, 0.0) for n in range(3)]
  first = runs[0]['logp']['trained']
  table = {
    side: {
      'samples': [256] * 60,
      'correct': rng.binomial(256, np.exp(first[stage])).tolist(),
      'logp_error': 1e-6,
    }
    for side, stage in (('base', 'base'), ('policy', 'rl'))
  }
  language = {
    'base': {'samples': [16] * 40, 'correct': [1] * 36 + [0] * 4},
    'policy': {'samples': [16] * 40, 'correct': [16] * 20 + [0] * 20},
  }
  sampled = {'exposure': 0.01, 'seed': 0, **table}
  return {'chain': runs, 'sampled': sampled, 'smollm2': language}


def failing(of, results):
  return {key for key, (ok, _) in of['judge'].judge(results).items() if not ok}


def test_a_world_as_it_was_expected_passes(of):
  assert not failing(of, world())


def shift(results, where, stage, by, runs=slice(None)):
  for run in results['chain'][runs]:
    values = run['logp']['trained'][stage]
    run['logp']['trained'][stage] = [
      min(x + by, -1e-3) if where(i) else x for i, x in enumerate(values)
    ]


EVERY, FEW = (lambda i: True), (lambda i: i < 5)


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    # one base says it half as often as its corpus
    (lambda x: shift(x, EVERY, 'base', -0.7, slice(3, 4)), {'calibrated'}),
    # RL drops nothing, in two seeds of ρ = 0.03
    (
      lambda x: shift(x, FEW, 'rl', 20.0, slice(3, 5)),
      {'crossover_0.03', 'interference_0.03'},
    ),
    # RL is worse from the start, and so is the tilt to its rate
    (
      lambda x: shift(x, EVERY, 'rl', -20.0, slice(3, 5)),
      {'learned', 'crossover_0.03', 'sharpening', 'tilt'},
    ),
    # RL finds what it was never shown
    (lambda x: shift(x, EVERY, 'rl', 3.0, slice(6, 8)), {'unseen'}),
    (
      lambda x: x['chain'][1]['tempered'].update(first=[1.0] * 30),
      {'sharpening'},
    ),
    (lambda x: x['sampled']['base'].update(correct=[9] * 60), {'sampled'}),
    (
      lambda x: x['smollm2'].update(policy=x['smollm2']['base']),
      {'smollm2_first', 'smollm2_last'},
    ),
    (lambda x: x['chain'].pop(2), {'crossover_0.01', 'interference_0.01'}),
  ],
)
def test_every_criterion_can_fail(of, change, expected):
  results = copy.deepcopy(world())
  change(results)
  assert failing(of, results) == expected


def test_a_tilt_that_loses_fails(of, monkeypatch):
  monkeypatch.setattr(of['analysis'], 'tilt', lambda log_p0, mean: log_p0 - 0.01)
  assert failing(of, world()) == {'tilt'}


def test_a_run_measured_again_takes_its_own_place(of):
  old = [{'exposure': 0.01, 'seed': n, 'x': n} for n in (0, 2)]
  new = [{'exposure': 0.01, 'seed': 2, 'x': 9}, {'exposure': 0.0, 'seed': 5, 'x': 5}]
  assert [run['x'] for run in of['run'].merged(old, new)] == [5, 0, 9]


def test_the_rare_responses_that_no_vote_goes_to_are_left_out(of):
  p0 = np.r_[np.full(15, 0.06), np.full(100, 1e-3)][None]
  correct = np.eye(115)[[40]]
  p, same = of['run'].listed(p0, correct)
  assert same is correct
  assert np.flatnonzero(p[0]).tolist() == [*range(15), 40]
  np.testing.assert_allclose(p[0, 40], 1e-3 / 0.901)
