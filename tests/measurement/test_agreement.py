"""Agreement and calibration against numbers computed by hand, rewards against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import sharding
from educe.data import sources, tokenizer
from educe.measurement import agreement as module
from educe.measurement.agreement import agreement, evaluate
from educe.models import policy, presets
from educe.types import Batch

BYTE = tokenizer.load(path='byte')
MODEL = policy.build(presets.debug)
PAIRS = [
  dict(prompt=f'{i}+1=', chosen=f'{i + 1}', rejected='x' * (3 * i + 1))
  for i in range(7)
]


def test_agreement_by_hand():
  # Confidence 0.77 (three, of which one the wrong way round), 0.5 and 0.96.
  p = np.array([0.77, 0.77, 0.23, 0.5, 0.96])
  margins = np.log(p / (1 - p))
  got = agreement(margins + 7.0, np.full(5, 7.0))
  assert got.rate == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5)
  assert got.total == 5
  # Bins of 1/20 from 1/2.
  assert [n for n, _, _ in got.bins] == [1, 3, 1]
  np.testing.assert_allclose([c for _, c, _ in got.bins], [0.5, 0.77, 0.96])
  np.testing.assert_allclose([s for _, _, s in got.bins], [0.5, 2 / 3, 1])
  assert got.ece == pytest.approx((0 + 3 * (0.77 - 2 / 3) + 0.04) / 5)
  assert got.nll == pytest.approx(-np.log(p).mean())
  assert got.margin == pytest.approx(margins.mean())
  # Wilson's score interval solves |p − π| = z·√(π(1 − π)/n).
  for bound in (got.low, got.high):
    z = abs(got.rate - bound) / np.sqrt(bound * (1 - bound) / 5)
    assert z == pytest.approx(1.959964, abs=1e-6)


def test_swapping_the_sides_turns_it_round():
  rng = np.random.default_rng(0)
  chosen, rejected = rng.normal(size=(2, 200))
  one, two = agreement(chosen, rejected), agreement(rejected, chosen)
  assert one.rate == pytest.approx(1 - two.rate)
  assert one.margin == pytest.approx(-two.margin)
  assert [c for _, c, _ in one.bins] == [c for _, c, _ in two.bins]


def test_labels_drawn_from_the_model_are_calibrated():
  """20,000 pairs labelled by Bradley–Terry itself: an error of about 1/√(n per bin)."""
  rng = np.random.default_rng(0)
  margins = rng.normal(size=20_000) * 2
  wins = rng.uniform(size=20_000) < 1 / (1 + np.exp(-margins))
  signed = np.where(wins, margins, -margins)
  assert agreement(signed, np.zeros(20_000)).ece < 0.01
  assert agreement(3 * signed, np.zeros(20_000)).ece > 0.1  # too sure of itself
  huge = agreement(np.array([1e4, -1e4]), np.zeros(2))
  assert huge.nll == pytest.approx(5e3)
  assert huge.ece == pytest.approx(0.5)


@pytest.mark.parametrize(
  ('chosen', 'match'), [([], 'no pairs'), ([1.0, np.nan], 'pair 1 are not finite')]
)
def test_rewards_that_say_nothing(chosen, match):
  with pytest.raises(ValueError, match=match):
    agreement(np.array(chosen), np.zeros(len(chosen)))


def params(seed):
  return MODEL.init(jax.random.key(seed))


def log_prob(weights, record, side):
  """(Σ log π of the completion, its tokens), in float64, of one unpadded row."""
  prompt = [BYTE.bos_id, *BYTE.encode(record['prompt'])]
  tokens = np.array([*prompt, *BYTE.encode(record[side]), BYTE.eos_ids[0]])
  states, _ = MODEL.hidden(weights, tokens[None])
  logits = np.asarray(states[0], np.float64) @ np.asarray(
    MODEL.head(weights).matrix, np.float64
  )
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  drawn = range(len(prompt), len(tokens))
  return sum(logits[t - 1, tokens[t]] for t in drawn), len(drawn)


def run(reference=None, model=MODEL, data=PAIRS, **options):
  options = dict(max_length=40, batch_size=2, beta=0.5) | options
  source = sources.memory(records=data)
  return evaluate(model, params(0), BYTE, reference, source=source, **options)


def rewards_of(result):
  return np.array([[r['rewards'][s] for s in ('chosen', 'rejected')]
                   for r in result.transcripts])  # fmt: skip


def test_implicit_rewards():
  result = run(reference=params(1))
  want = [
    [0.5 * (log_prob(params(0), r, s)[0] - log_prob(params(1), r, s)[0])
     for s in ('chosen', 'rejected')]
    for r in PAIRS
  ]  # fmt: skip
  # Sums of up to 20 log-probs in float32.
  np.testing.assert_allclose(rewards_of(result), want, atol=1e-4)
  assert result.rate == np.mean([w > lost for w, lost in want])
  assert [r['id'] for r in result.transcripts] == [*range(7)]
  assert result.transcripts[2]['prompt'] == '2+1='
  assert result.transcripts[2]['chosen'] == '3'
  assert result.transcripts[2]['rejected'] == 'x' * 7


def test_rows_are_spread_over_the_mesh_of_the_params(mesh_of):
  mesh = mesh_of(2, 2)
  weights = sharding.place(params(0), MODEL.axes, mesh)
  source = sources.memory(records=PAIRS)
  options = dict(source=source, max_length=40, reward='average', beta=0.5)
  alone = run(reward='average')
  for size in (2, 3):  # pairs: 6 rows do not divide into 4, and are read all the same
    spread = evaluate(MODEL, weights, BYTE, batch_size=size, **options)
    # float32, summed in another order
    np.testing.assert_allclose(rewards_of(spread), rewards_of(alone), atol=1e-5)
  batch = Batch(np.zeros((4, 3), np.int32), np.zeros((4, 3), np.float32))
  assert len(module._spread(batch, weights).tokens.sharding.device_set) == 4


def test_average_log_probs_need_no_reference():
  want = []
  for r in PAIRS:
    sums = [log_prob(params(0), r, s) for s in ('chosen', 'rejected')]
    want.append([0.5 * total / n for total, n in sums])
  np.testing.assert_allclose(rewards_of(run(reward='average')), want, atol=1e-5)


def test_values_are_read_behind_the_last_token():
  def values(weights, states, tokens, positions, segments):
    del weights, states, positions, segments
    return jnp.cumsum(tokens, -1).astype(jnp.float32), {}  # of all that was read

  valued = MODEL._replace(values=values)
  result = run(model=valued, reward='value', beta=None)
  want = [
    [sum([BYTE.bos_id, *BYTE.encode(r['prompt'] + r[s]), BYTE.eos_ids[0]])
     for s in ('chosen', 'rejected')]
    for r in PAIRS
  ]  # fmt: skip
  np.testing.assert_array_equal(rewards_of(result), want)


def judged(model, data, **options):
  options = dict(max_length=40, batch_size=2, reward='value', **options)
  return evaluate(
    model, params(0), BYTE, source=sources.memory(records=data), **options
  )


def heard(weights, states, tokens, positions, segments):
  """The value of a prefix: how far the sum of its ids is from 700, in hundreds."""
  del weights, states, positions, segments
  return (jnp.cumsum(tokens, -1) - 700) / 100, {}


def total_of(text, end):
  ids = [BYTE.bos_id, *BYTE.encode(text), *([BYTE.eos_ids[0]] if end else [])]
  return (sum(ids) - 700) / 100


@pytest.mark.parametrize('records', ['rated', 'steps'])
def test_a_verifier_is_held_against_what_was_judged(records):
  model = MODEL._replace(values=heard)
  if records == 'rated':
    data = [
      dict(prompt=f'{i}=', completion='z' * i + '!', rating=i % 2) for i in range(1, 6)
    ]
    read = [(total_of(r['prompt'] + r['completion'], True), r['rating']) for r in data]
  else:
    data = [
      dict(prompt=f'{i}=', completions=['a' * i, 'b', 'c!'], labels=[1, i % 2, 0])
      for i in range(1, 4)
    ]
    read = []
    for r in data:
      one, two, three = r['completions']
      text = r['prompt'] + one
      read += [
        (total_of(text, False), 1),
        (total_of(f'{text}\n{two}', False), r['labels'][1]),
      ]
      read.append((total_of(f'{text}\n{two}\n{three}', True), 0))
  margins = np.array([v if y else -v for v, y in read])
  result = judged(model, data, records=records)
  assert 0 < (margins > 0).mean() < 1
  assert result.total == len(read)
  assert result.rate == (margins > 0).mean()
  assert result.margin == pytest.approx(margins.mean(), rel=1e-6)
  assert result.nll == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-6)
  assert str(result).startswith(f'{result.rate:.1%} of {len(read)} ')
  assert ('steps' if records == 'steps' else 'completions') in str(result)
  got = [
    pair
    for row in result.transcripts
    for pair in zip(row['values'], row['labels'], strict=True)
  ]
  np.testing.assert_allclose(got, read, rtol=1e-6)
  assert result.transcripts[0]['prompt'] == '1='


def test_ratings_that_are_no_judgements_are_refused():
  model = MODEL._replace(values=heard)
  data = [dict(prompt='p', completion=c, rating=r) for c, r in (('a', 1), ('b', 0.5))]
  with pytest.raises(
    ValueError, match=r'record 1 is rated 0\.5; agreement is with right'
  ):
    judged(model, data, records='rated')


def test_long_pairs_are_counted():
  result = run(reward='average', max_length=20)
  kept = [r for r in PAIRS if 2 + len(r['prompt'] + r['rejected']) <= 20]
  assert (result.total, result.dropped) == (len(kept), 7 - len(kept))
  assert f'{7 - len(kept)} too long' in str(result)
  assert run(reward='average', max_length=20, overlong='truncate').total == 7
  assert run(reward='average', size=3).total == 3
  # What is left without a difference is no pair either.
  same = dict(prompt='p', chosen='a' * 40 + 'b', rejected='a' * 40 + 'c')
  result = run(
    reward='average', max_length=20, overlong='truncate', data=[*PAIRS, same]
  )
  assert (result.total, result.dropped) == (7, 1)


def test_the_policy_against_itself_is_undecided():
  result = run(reference=params(0))
  assert (result.rate, result.nll) == (0.5, pytest.approx(np.log(2)))
  assert result.metrics()['preferences/ece'] == 0


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({}, "reward='implicit' compares with a reference, and none"),
    ({'reward': 'value', 'beta': None}, 'has no value head: add config.value'),
    ({'reward': 'value'}, "beta=0.5: reward='value' takes none"),
    ({'reward': 'logp'}, "reward='logp' is not one of"),
    ({'beta': None}, 'beta=None must be positive'),
    ({'max_length': 1}, 'max_length=1 must be at least 2'),
    ({'size': 0}, 'size=0 at least 1'),
    ({'records': 'rated'}, "records='rated' is of a reward model"),
    ({'records': 'unpaired'}, "records='unpaired' is not one of"),
    ({'reward': 'average', 'data': [dict(PAIRS[0], rejected='1')]}, 'are the same'),
  ],
)
def test_what_cannot_be(options, match):
  with pytest.raises(ValueError, match=match):
    run(**options)


def test_it_compiles_once():
  run(reference=params(1))
  before = module._read._cache_size()
  run(reference=params(2))
  assert module._read._cache_size() == before
