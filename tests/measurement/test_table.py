"""The samples table: what is drawn, under whom it is scored, how it goes on exactly."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.data import tokenizer as tokenizers
from educe.environments import prompts, reward_functions
from educe.measurement import table

WORDS = tokenizers.load(path='byte')
LETTERS = [ord(c) for c in 'abcdefgh ']
HEADER = {'base': 'b', 'policy': 'p', 'environment': {'name': 'vowels'}}


def many_a(prompt, completion, columns):
  return float(completion.count('a')) if 'h' not in completion else None


def world(count=20):
  asked = [{'prompt': f'say {i}'} for i in range(count)]
  return reward_functions.make(prompts=asked, functions=many_a)


def policy(likes):
  model, params = toy.model(vocabulary=WORDS.vocab_size, max_length=64)
  params = params.at[:, jnp.array(LETTERS)].add(14)
  params = params.at[:, jnp.array(WORDS.eos_ids)].add(13)
  return model, params.at[:, ord(likes)].add(2)


MODEL, BASE = policy('b')
_, POLICY = policy('a')


def draw(folder, samples, header=HEADER, environment=None, **options):
  table.draw(
    folder,
    {'base': (MODEL, BASE), 'policy': (MODEL, POLICY)},
    WORDS,
    environment or world(),
    header,
    samples=samples,
    **{'max_new_tokens': 5, 'batch_size': 32, **options},
  )


def log_probs(weights, prompt, text, stopped, temperature):
  """Of a completion, token by token, in float64; with each token that may have ended it."""
  history = [WORDS.bos_id, *WORDS.encode(prompt)]
  total = 0.0
  for token in WORDS.encode(text):
    total += toy.log_softmax(toy.logits(weights, history) / temperature)[token]
    history.append(token)
  if not stopped:
    return np.array([total])
  last = toy.log_softmax(toy.logits(weights, history) / temperature)
  return total + last[list(WORDS.eos_ids)]


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  folder = tmp_path_factory.mktemp('table')
  draw(folder, 6, temperature=0.8)
  return folder


def test_samples_are_scored_under_both(drawn):
  got = table.load(drawn)
  assert got.ids == list(range(20))
  assert got.prompts[3] == 'say 3'
  assert got.header['decoding'] == {'max_new_tokens': 5, 'temperature': 0.8, 'seed': 0}
  for side, own in ((got.base, 'b'), (got.policy, 'a')):
    assert side.rewards.shape == (20, 6)
    joined = ''.join(text for line in side.texts for text in line)
    assert max('ab', key=joined.count) == own
    for p in (0, 19):
      for n in (0, 5):
        text, stopped = side.texts[p][n], side.stopped[p, n]
        assert side.lengths[p, n] == len(text) + stopped
        want = many_a(None, text, None)
        np.testing.assert_equal(side.rewards[p, n], np.nan if want is None else want)
        for name, weights in (('logp_base', BASE), ('logp_policy', POLICY)):
          want = log_probs(weights, f'say {p}', text, stopped, 0.8)
          # float32 log-probs, at most 6 a row
          assert np.abs(getattr(side, name)[p, n] - want).min() < 1e-4


def test_no_two_samples_of_a_prompt_are_drawn_alike(drawn):
  """Sixteen letters of nine: the same twice by chance is seen once in a while."""
  got = table.load(drawn)
  different = [len(set(line)) for line in got.base.texts + got.policy.texts]
  assert np.mean(different) > 5


def equal(a, b):
  assert (a.ids, a.prompts, a.base.texts) == (b.ids, b.prompts, b.base.texts)
  assert a.policy.texts == b.policy.texts
  for one, two in ((a.base, b.base), (a.policy, b.policy)):
    for name in ('rewards', 'logp_base', 'logp_policy', 'lengths', 'stopped'):
      # Batches of other sizes are other float32 programs.
      np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-4)


def test_a_table_grows_to_what_it_would_have_been(drawn, tmp_path):
  draw(tmp_path / 't', 2, temperature=0.8, batch_size=16)
  before = {p: p.read_bytes() for p in tmp_path.rglob('*.jsonl')}
  draw(tmp_path / 't', 6, temperature=0.8, batch_size=64)
  assert all(p.read_bytes() == text for p, text in before.items())
  equal(table.load(tmp_path / 't'), table.load(drawn))
  equal(table.load(tmp_path / 't', 2), table.load(drawn, 2))


def test_a_table_that_was_stopped_goes_on(drawn, tmp_path, capsys):
  draw(tmp_path, 6, temperature=0.8)
  whole = sorted(tmp_path.rglob('*.jsonl'))
  for file in whole[::2]:
    file.unlink()
  draw(tmp_path, 6, temperature=0.8)
  assert sorted(tmp_path.rglob('*.jsonl')) == whole
  equal(table.load(tmp_path), table.load(drawn))
  times = [file.stat().st_mtime_ns for file in whole]
  draw(tmp_path, 6, temperature=0.8)
  assert [file.stat().st_mtime_ns for file in whole] == times
  assert 'has its 6 samples of each prompt already' in capsys.readouterr().err


def test_processes_share_the_blocks(drawn, tmp_path, monkeypatch):
  monkeypatch.setattr(table.hosts, 'count', lambda: 2)
  for process in (0, 1):
    monkeypatch.setattr(table.hosts, 'index', lambda process=process: process)
    draw(tmp_path, 6, temperature=0.8)
    names = {file.name[:5] for file in tmp_path.rglob('*.jsonl')}
    assert names == {f'{block:05}' for block in range(process + 1)}
  equal(table.load(tmp_path), table.load(drawn))


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    (
      dict(header={**HEADER, 'environment': {}}),
      "a table of environment={'name': 'vow",
    ),
    (dict(temperature=1.0), 'a table of decoding='),
    (dict(samples=0), 'samples=0'),
    (dict(temperature=0.0), 'temperature=0.0 must be above 0'),
  ],
)
def test_what_is_not_this_table_is_refused(drawn, options, match):
  options = {'samples': 6, 'temperature': 0.8, **options}
  with pytest.raises(ValueError, match=match):
    draw(drawn, options.pop('samples'), **options)


def test_what_cannot_be_read_is_one_line(drawn, tmp_path):
  with pytest.raises(ValueError, match='samples=7 asked of a table that has 6'):
    table.load(drawn, 7)
  with pytest.raises(ValueError, match='holds no samples table'):
    table.load(tmp_path)
  (tmp_path / table.HEADER).write_text('{}')
  with pytest.raises(ValueError, match='no samples yet'):
    table.load(tmp_path)
  (tmp_path / table.HEADER).write_text('{')
  with pytest.raises(ValueError, match='is damaged'):
    table.load(tmp_path)


def test_prompts_that_nobody_judges_have_no_reward(tmp_path):
  draw(tmp_path, 1, environment=prompts.make(source=[{'prompt': 'a'}]))
  assert np.isnan(table.load(tmp_path).base.rewards).all()
  row = json.loads((tmp_path / 'base' / '00000-000000-000000.jsonl').read_text())
  assert row['reward'] is None


def test_a_table_is_of_weights_wherever_they_lie(tmp_path):
  """Trained on since: another table. Moved: the same."""
  draw(tmp_path, 2)
  draw(tmp_path, 3, header={**HEADER, 'base': 'moved/b'})
  trained = {'base': (MODEL, BASE), 'policy': (MODEL, POLICY * 1.0000002)}
  with pytest.raises(ValueError, match='holds a table of weights='):
    table.draw(
      tmp_path,
      trained,
      WORDS,
      world(),
      HEADER,
      samples=4,
      max_new_tokens=5,
      batch_size=32,
    )


def test_a_fingerprint_is_of_every_bit_and_place():
  x = {'a': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(4, jnp.bfloat16)}
  same = {'a': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(4, jnp.bfloat16)}
  assert table.fingerprint(x) == table.fingerprint(same)
  for other in (
    {**x, 'a': x['a'].at[1, 2].add(1e-6)},
    {**x, 'a': x['a'][::-1]},
    {**x, 'b': x['b'].at[0].multiply(-1)},
  ):
    assert table.fingerprint(x) != table.fingerprint(other)


@pytest.mark.parametrize(
  ('damage', 'said'),
  [
    (
      lambda text: text[: text.rindex(':') - 3],
      'Unterminated string|Expecting',
    ),  # in a line
    (lambda text: ''.join(text.splitlines(keepends=True)[:-1]), 'after 31 rows'),
    (lambda text: text.replace('"logp_policy"', '"other"'), 'rows without logp_policy'),
  ],
)
def test_a_damaged_file_is_named(tmp_path, damage, said):
  draw(tmp_path, 2)
  file = sorted((tmp_path / 'policy').glob('*.jsonl'))[0]
  file.write_text(damage(file.read_text()))
  match = rf'{file.name} is damaged \(.*({said}).*\): delete it and run'
  with pytest.raises(ValueError, match=match):
    table.load(tmp_path)
  file.unlink()
  draw(tmp_path, 2)
  assert table.load(tmp_path).policy.rewards.shape == (20, 2)


def test_prompts_of_one_id_are_refused(tmp_path):
  doubled = world(2)
  doubled = doubled._replace(prompts=[{**x, 'id': 'same'} for x in doubled.prompts])
  with pytest.raises(ValueError, match="1 ids of several prompts, such as 'same'"):
    draw(tmp_path, 2, environment=doubled)
