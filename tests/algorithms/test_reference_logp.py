"""Computed once, read by whoever has the same data and weights, and by nobody else."""

import dataclasses

import jax
import numpy as np
import pytest

from educe.algorithms import reference_logp
from educe.data import pipeline, sources, tokenizer
from educe.models import policy, presets

BYTE = tokenizer.load(path='byte')
MODEL = policy.build(presets.debug)
PAIRS = [
  dict(prompt=f'p{i}', chosen='c' * (5 * i + 1), rejected=f'r{i}') for i in range(7)
]


def batches(data=PAIRS, words=BYTE, **options):
  options = dict(batch_size=3, max_length=24, records='pairs') | options
  return pipeline.make(sources.memory(records=data), words, **options)


class Logp:
  """−(token + scale·column) of a row: a log-prob that says where it comes from."""

  def __init__(self, fails_at=None):
    self.calls, self.fails_at = 0, fails_at

  def __call__(self, params, tokens, mask):
    if self.calls == self.fails_at:
      raise KeyboardInterrupt
    self.calls += 1
    assert tokens.shape == (6, 24)  # always the run's own shape
    return expected(params, tokens) * mask


def expected(params, tokens):
  scale = float(np.asarray(params['x']))
  return -(tokens + scale * np.arange(tokens.shape[1])).astype(np.float32)


def load(folder, data=None, logp=None, params=None, model=MODEL):
  params = {'x': jax.numpy.float32(0.5)} if params is None else params
  data, logp = data or batches(), logp or Logp()
  return reference_logp.load_or_compute(folder, model, params, data, logp), logp


def test_each_row_gets_its_own_in_any_order_of_records(tmp_path):
  stored, logp = load(tmp_path / 'new')
  data = batches(seed=3)
  for _ in range(6):  # several epochs
    rows = next(data)
    got = stored.rows(rows['ids'], rows['mask'])
    want = expected({'x': 0.5}, rows['tokens']) * rows['mask']
    np.testing.assert_array_equal(got, want)
  # Two of seven records do not fit into 24 tokens.
  assert data.counts()['dropped_overlong'] > 0
  assert logp.calls == 2


def test_the_same_run_reads_what_is_there(tmp_path):
  first, _ = load(tmp_path)
  second, logp = load(tmp_path, batches(seed=9, shuffle=False))
  assert logp.calls == 0
  np.testing.assert_array_equal(first.logp, second.logp)
  assert [p.suffix for p in tmp_path.iterdir()] == ['.npz']


@pytest.mark.parametrize(
  'change',
  [
    dict(params={'x': jax.numpy.float32(0.5000001)}),
    dict(data=lambda: batches([dict(PAIRS[0], rejected='other'), *PAIRS[1:]])),
    dict(data=lambda: batches(words=tokenizer.load(path='characters:pcr0123456'))),
    dict(data=lambda: batches(max_length=24, overlong='truncate')),
    dict(model=policy.build(presets.chain)),
  ],
)
def test_whatever_it_depends_on_makes_another(change, tmp_path):
  load(tmp_path)
  change = {k: v() if callable(v) else v for k, v in change.items()}
  _, logp = load(tmp_path, **change)
  assert logp.calls > 0
  assert len([*tmp_path.iterdir()]) == 2


def test_another_template_makes_another(tmp_path):
  chats = [
    dict(
      prompt=[dict(role='user', content='p')],
      chosen=[dict(role='assistant', content=f'c{i}')],
      rejected=[dict(role='assistant', content='r')],
    )
    for i in range(3)
  ]
  keys = set()
  for mark in '#:':
    words = dataclasses.replace(BYTE, chat_template=_template(mark))
    data = batches(chats, words, max_length=200)
    rows = [data.rows_of(i) for i in range(3)]
    keys.add(reference_logp.key(MODEL, {'x': np.float32(0)}, rows))
  assert len(keys) == 2


def _template(mark):
  return (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}" + mark + "{{ m['content'] }}"
    '<|im_end|>{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant' + mark + '{% endif %}'
  )


def test_an_interrupted_computation_leaves_nothing(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    load(tmp_path, logp=Logp(fails_at=1))
  assert not [*tmp_path.iterdir()]


def test_a_damaged_file_is_named(tmp_path):
  load(tmp_path)
  (file,) = tmp_path.iterdir()
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(ValueError, match=r'\.npz is damaged .*delete it'):
    load(tmp_path)


def test_a_record_that_changed_is_named(tmp_path):
  stored, _ = load(tmp_path)
  rows = next(batches([dict(r, chosen='longer') for r in PAIRS[:3]]))
  with pytest.raises(ValueError, match='the data changed during the run'):
    stored.rows(rows['ids'], rows['mask'])


def test_nothing_kept_is_refused(tmp_path):
  with pytest.raises(ValueError, match='every record is dropped'):
    load(tmp_path, batches([dict(prompt='p' * 90, chosen='a', rejected='b')] * 3))


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
  def half(stream, **arrays):
    stream.write(b'half of it')
    raise OSError('no space left on device')

  monkeypatch.setattr(reference_logp.np, 'savez', half)
  with pytest.raises(OSError, match='could not be written'):
    load(tmp_path)
  assert not [*tmp_path.iterdir()]


def test_the_same_tokens_with_another_end_of_the_prompt_make_another():
  """They are trained from another token on: as many log-probs would not fit."""
  keys, tokens = set(), set()
  for prompt, start in (('p', 'qr'), ('pq', 'r')):
    data = [dict(prompt=prompt, chosen=f'{start}a', rejected=f'{start}b')] * 3
    rows = batches(data).rows_of(0)
    tokens.add(rows['tokens'].tobytes())
    keys.add(reference_logp.key(MODEL, {'x': np.float32(0)}, [rows]))
  assert len(tokens) == 1
  assert len(keys) == 2


def test_a_dropped_record_keeps_its_place():
  """Where the log-probs of a record start depends on it."""
  rows = batches().rows_of(0)
  params = {'x': np.float32(0)}
  keys = {
    reference_logp.key(MODEL, params, records)
    for records in ([rows], [None, rows], [rows, None], [None, None, rows])
  }
  assert len(keys) == 4


def test_the_same_numbers_under_another_name_make_another():
  one, two = ({name: np.float32(0.5)} for name in ('x', 'y'))
  assert reference_logp.key(MODEL, one, []) != reference_logp.key(MODEL, two, [])


def test_a_reference_that_is_broken_is_not_stored(tmp_path):
  broken = lambda params, tokens, mask: np.full(tokens.shape, np.nan)  # noqa: E731
  with pytest.raises(ValueError, match=r'not finite: look at config\.model'):
    load(tmp_path, logp=broken)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('content', [b'', b'not a zip', b'PK\x05\x06' + bytes(18)])
def test_a_file_that_is_no_store_is_named(tmp_path, content):
  load(tmp_path)
  (file,) = tmp_path.iterdir()
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r'\.npz is damaged .*delete it'):
    load(tmp_path)
