import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from educe.environments import tabular
from educe.environments.language import (
  ALPHABET,
  HOLE,
  MASSES,
  OUTPUTS,
  REGIMES,
  SYMBOLS,
  conditionals,
  describe,
  index,
  make,
  prefixes,
  records,
  rewards,
  sequence_logp,
  text,
)

EVERY = [''.join(symbols) for symbols in itertools.product(SYMBOLS, repeat=4)]
WORLDS = range(3)


def of_regime(known, regime):
  """(prompt, [the correct outputs as text]) of each prompt of a regime."""
  for i, name in enumerate(known.regimes):
    if name == regime:
      yield i, [EVERY[j] for j in np.flatnonzero(known.correct[i])]


def chance(row, begins):
  """The mass of all texts that begin so, by a loop over them."""
  return sum(row[j] for j, t in enumerate(EVERY) if t.startswith(begins))


def after(rows, place, before, symbol):
  """p(symbol at place | before at place − 1), pooled over rows `[P, 4096]`."""
  there = OUTPUTS[:, place - 1] == SYMBOLS.index(before)
  both = there & (OUTPUTS[:, place] == SYMBOLS.index(symbol))
  return rows[:, both].sum() / rows[:, there].sum()


def test_an_index_is_a_place_in_the_alphabetical_order():
  assert [text(i) for i in range(4096)] == EVERY == sorted(EVERY)
  assert [index(t) for t in EVERY] == list(range(4096))
  for t, symbols in zip(EVERY, OUTPUTS, strict=True):
    assert t == ''.join(SYMBOLS[s] for s in symbols)


@pytest.mark.parametrize('world', WORLDS)
def test_every_prompt_is_a_distribution_with_the_mass_that_its_regime_names(world):
  known = describe(world=world)
  assert known.p_data.shape == known.correct.shape == (64, 4096)
  assert (known.p_data >= 0).all()
  # 4,096 additions of numbers below 1: 4096·2⁻⁵³ = 5e-13 at the very worst.
  np.testing.assert_allclose(known.p_data.sum(1), 1, rtol=0, atol=1e-12)
  assert Counter(known.regimes) == dict(
    basin=13, tail=13, deep_tail=13, barrier=13, singular=12
  )
  sizes = known.correct.sum(1)
  assert sizes.min() == 1
  assert sizes.max() == 6
  for regime, mass in MASSES.items():
    for i, right in of_regime(known, regime):
      got = sum(known.p_data[i, EVERY.index(t)] for t in right)
      np.testing.assert_allclose(got, mass, rtol=1e-12, atol=0)


@pytest.mark.parametrize('world', WORLDS)
def test_behind_a_barrier_every_step_is_likely_elsewhere_and_the_whole_never(world):
  known = describe(world=world)
  for i, right in of_regime(known, 'barrier'):
    others = np.array([j != i for j in range(64)])
    plain = others & (np.array(known.regimes) != 'basin')
    for t in right:
      assert known.p_data[i, EVERY.index(t)] == 0
      assert chance(known.p_data[i], t[:1]) == pytest.approx(1 / 6, rel=1e-9)
      for place in (1, 2, 3):
        # .2 in the background, of which some other prompts behind barriers lack a few
        # transitions; a basin of 13 may be one output, with .3 of its prompt's mass.
        step = place, t[place - 1], t[place]
        assert 0.17 < after(known.p_data[plain], *step) < 0.21
        assert 0.15 < after(known.p_data[others], *step) < 0.3
      # The prompt itself takes the last steps too, but never the second.
      assert chance(known.p_data[i], t[:2]) == 0
      for place in (2, 3):
        assert 0.1 < after(known.p_data[[i]], place, t[place - 1], t[place]) < 0.3


@pytest.mark.parametrize('world', WORLDS)
def test_what_is_singular_needs_a_symbol_that_nobody_has_at_its_place(world):
  known = describe(world=world)
  place, symbol = HOLE
  there = OUTPUTS[:, place] == symbol
  assert known.p_data[:, there].sum() == 0
  for other in set(range(4)) - {place}:  # elsewhere it is a symbol like others
    assert known.p_data[:, OUTPUTS[:, other] == symbol].sum() > 1
  for i, regime in enumerate(known.regimes):
    assert (known.correct[i] & there).any() == (regime == 'singular')
    assert (known.correct[i] <= there).all() == (regime == 'singular')
  for i, right in of_regime(known, 'singular'):
    for t in right:  # all but the hole is as likely as can be
      assert chance(known.p_data[i], t[:1]) == pytest.approx(0.2)
      assert chance(known.p_data[i], t[:2]) == pytest.approx(0.04)


def background(world):
  """Of every prompt: what is singular takes nothing from it, and puts nothing on it."""
  return describe(regimes=['singular'], world=world).p_data


def test_the_background_is_a_chain_whose_transitions_all_prompts_share():
  steps = conditionals(background(0))
  weights = [0.02, 0.03, 0.05, 0.1, 0.2, 0.2, 0.2, 0.2]
  at_hole = [0, 0.05, 0.05, 0.1, 0.2, 0.2, 0.2, 0.2]
  np.testing.assert_allclose(np.sort(steps[:, 0]), [weights] * 64, atol=1e-14)
  assert len({tuple(row.argsort()) for row in steps[:, 0]}) > 60  # of the prompt
  by_place: dict[tuple[int, str], list] = {}
  for place, prefix in enumerate(prefixes()[1:], 1):
    row = steps[:, place]
    there = np.isfinite(row[:, 0])  # else the prefix goes through the hole
    assert there.all() or not there.any()
    if there.all():
      by_place.setdefault((len(prefix), prefix[-1]), []).append(row)
  assert len(by_place) == 3 * 8 - 1
  for (place, _), rows in by_place.items():
    one = rows[0][0]
    np.testing.assert_allclose(rows, np.broadcast_to(one, np.shape(rows)), atol=1e-13)
    expected = at_hole if place == HOLE[0] else weights
    np.testing.assert_allclose(np.sort(one), expected, atol=1e-13)


@pytest.mark.parametrize('world', WORLDS)
def test_a_regime_only_scales_the_background_inside_and_outside(world):
  """p_data = m·b(·|C) + (1 − m)·b(·|not K), with b known from elsewhere."""
  known, b = describe(world=world), background(world)
  for i, regime in enumerate(known.regimes):
    p, inside, mass = known.p_data[i], known.correct[i], MASSES[regime]
    if mass:
      np.testing.assert_allclose(p[inside], mass * b[i, inside] / b[i, inside].sum())
      # A tail is about what the background gives it: no exceptions to be learnt.
      if regime != 'basin':
        assert 0.5 < mass / b[i, inside].sum() < 2
    never = inside.copy()
    if regime == 'barrier':
      (begin,) = {EVERY[j][:2] for j in np.flatnonzero(inside)}
      never |= np.array([t.startswith(begin) for t in EVERY])
    open_ = (1 - mass) * b[i, ~never] / b[i, ~never].sum()
    np.testing.assert_allclose(p[~never], open_, rtol=1e-12)


@pytest.mark.parametrize('shape', [(2,), ()])
def test_enumeration_is_the_product_of_the_steps(shape):
  rng = np.random.default_rng(1)
  steps = np.log(rng.dirichlet(np.ones(8), (*shape, 585)))
  got = sequence_logp(steps)
  assert got.shape == (*shape, 4096)
  places = {prefix: i for i, prefix in enumerate(prefixes())}
  assert len(places) == 585
  for j in rng.choice(4096, 300, replace=False):
    t = EVERY[j]
    terms = [steps[..., places[t[:k]], SYMBOLS.index(t[k])] for k in range(4)]
    np.testing.assert_allclose(got[..., j], np.sum(terms, 0), rtol=1e-14)
  np.testing.assert_allclose(np.exp(got).sum(-1), 1, atol=1e-12)


def test_steps_and_outputs_are_the_same_distribution():
  p = describe(world=2).p_data
  steps = conditionals(p)
  mass = np.nansum(steps, -1)
  np.testing.assert_allclose(mass[np.isfinite(steps[..., 0])], 1, atol=1e-13)
  with np.errstate(divide='ignore'):
    back = np.exp(sequence_logp(np.log(steps)))
  np.testing.assert_allclose(back, p, rtol=1e-12, atol=0)
  for row, prefix in ((0, ''), (7, 'ab'), (30, 'hgc')):
    begun = chance(p[row], prefix)
    for s in SYMBOLS:
      got = steps[row, prefixes().index(prefix), SYMBOLS.index(s)]
      if begun:
        np.testing.assert_allclose(got, chance(p[row], prefix + s) / begun, rtol=1e-12)
      else:
        assert np.isnan(got)


def test_what_a_model_keeps_for_other_tokens_is_missing_from_the_sum():
  logp = sequence_logp(np.full((585, 8), np.log(0.9 / 8)))
  np.testing.assert_allclose(np.exp(logp).sum(), 0.9**4)


def test_records_are_draws_from_p_data():
  size, known = 200_000, describe(prompts=5, world=1)
  corpus = records(size=size, prompts=5, world=1, seed=3)
  assert len(corpus) == size
  counts = np.zeros((5, 4096))
  np.add.at(counts, (corpus.prompts, corpus.outputs), 1)
  assert (counts[known.p_data == 0] == 0).all()
  expected = known.p_data * counts.sum(1, keepdims=True)
  # Each prompt's chi-square over the outputs with 5 expected or more: mean df.
  for got, want in zip(counts, expected, strict=True):
    cells = want >= 5
    value = ((got - want)[cells] ** 2 / want[cells]).sum()
    assert abs(value - cells.sum()) < 5 * np.sqrt(2 * cells.sum())
  assert abs(counts.sum(1) - size / 5).max() < 5 * np.sqrt(size * 0.16)
  basin = counts[0, known.correct[0]].sum() / counts[0].sum()
  assert abs(basin - 0.3) < 5 * np.sqrt(0.21 / counts[0].sum())
  for k in range(50):
    assert corpus[k] == {
      'prompt': known.prompts[corpus.prompts[k]],
      'completion': EVERY[corpus.outputs[k]],
    }


def test_a_corpus_is_a_source():
  corpus = records(size=10)
  assert corpus[-1] == corpus[9] == list(corpus)[9]
  assert corpus[2:4] == [corpus[2], corpus[3]]
  with pytest.raises(IndexError):
    corpus[10]
  assert list(pickle.loads(pickle.dumps(corpus))) == list(corpus)
  prints = {records(size=10, seed=s, world=w).fingerprint for s, w in ((0, 0), (1, 0))}
  assert len(prints | {corpus.fingerprint}) == 2
  assert corpus.fingerprint != records(size=10, world=1).fingerprint


@pytest.mark.parametrize('reward', ['exact', 'graded'])
def test_the_environment_pays_every_output_what_the_table_says(reward):
  known = describe(prompts=5)
  environment, table = make(prompts=5, reward=reward), rewards(known, reward=reward)
  for i, record in enumerate(environment.prompts):
    assert record['prompt'] == known.prompts[i]
    assert record['regime'] == known.regimes[i] == record['id'].split('-')[0]
    assert [index(t) for t in record['correct']] == list(
      np.flatnonzero(known.correct[i])
    )
    best = max(record['correct'], key=lambda t: known.p_data[i, index(t)])
    assert known.p_data[i, index(record['answer'])] == known.p_data[i, index(best)]
    for j, t in enumerate(EVERY):
      turn = environment.respond(record, [t])
      assert turn.done
      assert turn.reward == table[i, j]
      assert (turn.info['outcome'] == 'verified') == known.correct[i, j]


def test_a_graded_reward_counts_the_symbols_that_begin_a_correct_output():
  known = describe(prompts=5)
  table = rewards(known, reward='graded')
  for i in range(5):
    right = [EVERY[j] for j in np.flatnonzero(known.correct[i])]
    for j, t in enumerate(EVERY):
      begun = max(k for k in range(5) for c in right if c.startswith(t[:k]))
      assert table[i, j] == begun / 4


def test_what_is_not_four_symbols_is_unparsable():
  environment = make(prompts=1, reward='graded')
  record = environment.prompts[0]
  answer = record['answer']
  strange = ('', answer[:3], answer + 'a', f'{answer[:3]}0', f'{answer[:2]} a', 'ABCD')
  for said in (*strange, f'<think>{answer}'):
    turn = environment.respond(record, [said])
    assert (turn.reward, turn.info['outcome']) == (0.0, 'unparsable')
  assert environment.respond(record, [f' {answer}\n']).reward == 1


def test_parts_share_no_prompt_and_each_has_every_regime():
  parts = {part: make(part=part).prompts for part in ('all', 'train', 'heldout')}
  ids = {part: {r['id'] for r in rows} for part, rows in parts.items()}
  assert not ids['train'] & ids['heldout']
  assert ids['train'] | ids['heldout'] == ids['all']
  assert len(ids['all']) == 64
  for part in ('train', 'heldout'):
    assert {r['regime'] for r in parts[part]} == set(REGIMES)
  assert Counter(r['regime'] for r in parts['heldout']) == dict.fromkeys(REGIMES, 3)


def test_a_smaller_world_has_the_first_prompts_of_a_larger():
  small, large = describe(prompts=7), describe()
  assert small.prompts == large.prompts[:7]
  np.testing.assert_array_equal(small.p_data, large.p_data[:7])
  np.testing.assert_array_equal(small.correct, large.correct[:7])
  assert (describe(world=1).p_data[:7] != small.p_data).any(1).all()
  assert set(describe(regimes=['tail']).regimes) == {'tail'}
  with pytest.raises(ValueError, match='read-only'):
    small.p_data[0, 0] = 1.0


def test_p_data_is_a_tilt_so_that_a_gibbs_policy_stays_inside_its_formula():
  """Reward 1[y ∈ C] on a tail gives a basin: the regimes differ in one number only."""
  known = describe()
  i, _ = next(of_regime(known, 'tail'))
  mass, goal = MASSES['tail'], MASSES['basin']
  beta = 1 / np.log(goal / (1 - goal) * (1 - mass) / mass)
  tilted = tabular.gibbs(known.p_data[i], rewards(known)[i], beta)
  np.testing.assert_allclose(tilted[known.correct[i]].sum(), goal, rtol=1e-12)


def test_the_alphabet_writes_it_all():
  from educe.data import chat, tokenizer

  small = tokenizer.load(path=f'characters:{ALPHABET}')
  assert small.vocab_size == 18
  row = records(size=1)[0]
  encoded = chat.encode_record(small, row)
  assert encoded.mask.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
  assert small.decode(encoded.tokens, skip_special=True) == ''.join(row.values())


@pytest.mark.parametrize(
  ('function', 'arguments', 'message'),
  [
    (describe, dict(prompts=0), 'prompts=0'),
    (make, dict(prompts=65), 'prompts=65'),
    (make, dict(regimes=('basin', 'tial')), 'deep_tail'),
    (make, dict(regimes=()), 'basin, tail'),
    (make, dict(part='test'), "'heldout'"),
    (make, dict(part='heldout', prompts=15), '20 prompts'),
    (make, dict(reward='process'), "'exact' or 'graded'"),
    (records, dict(size=0), 'size'),
    (records, dict(size=1, prompts=99), 'prompts=99'),
    (text, dict(output=4096), 'output=4096'),
    (index, dict(output='abc'), "'abc' is not 4"),
    (sequence_logp, dict(steps=np.zeros((584, 8))), '585'),
    (conditionals, dict(p=np.zeros((4, 512))), '4096'),
    (rewards, dict(known=None, reward='all'), "'exact' or 'graded'"),
  ],
)
def test_bad_input_is_one_clear_line(function, arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    function(**arguments)
  assert '\n' not in str(error.value)
