"""Where a reward model's score is read, and against what."""

import functools

import numpy as np
import pytest

from educe.algorithms import reward_model as algorithm
from educe.data import pipeline, sources, tokenizer
from educe.losses import reward_model
from educe.types import Mean

BYTE = tokenizer.load(path='byte')
PAIRS = [dict(prompt='p' * (i + 1), chosen='yes', rejected='no') for i in range(4)]
STEPS = [dict(prompt='p', completions=['a', 'bc'], labels=[1, i % 2]) for i in range(4)]
RATED = [dict(prompt='p', completion='c' * (i + 1), rating=i - 1.5) for i in range(4)]


class Valued:
  """A model with a value head, as far as the algorithm looks."""

  values = True


class Plain:
  values = None


def loss(scores, batch, *, wants=()):
  missing = [name for name in wants if getattr(batch, name) is None]
  if missing:
    raise ValueError(f'no {missing[0]}')
  total = (scores.values * batch.mask).sum()
  return Mean(total, batch.mask.sum()), {}


def make(records, data, wants=(), model=Valued, **options):
  return algorithm.make(
    model, batches_of(records, data, **options), functools.partial(loss, wants=wants)
  )


def batches_of(records, data, **options):
  return pipeline.make(
    sources.memory(records=data),
    BYTE,
    **dict(batch_size=2, max_length=16, records=records, shuffle=False) | options,
  )


def read(batch):
  """What stands before each column where a score is read."""
  return [
    [BYTE.decode(row[:t]) for t in np.flatnonzero(mask)]
    for row, mask in zip(batch.tokens, batch.mask, strict=True)
  ]


def test_the_score_of_a_completion_is_read_behind_its_stop_token():
  method = make('pairs', PAIRS)
  batch, info = method.next_batch(None)
  assert batch.tokens.shape == (4, 17)
  assert read(batch) == [
    [f'<|bos|>{prompt}{said}<|eos|>']
    for prompt in ('p', 'pp')
    for said in ('yes', 'no')
  ]
  assert batch.labels is None
  assert batch.returns is None
  assert (method.rows, method.group) == (4, 2)
  assert info['data/records'] == 2


def test_also_of_a_row_that_is_full():
  batch, _ = make('pairs', PAIRS, max_length=7, batch_size=1).next_batch(None)
  assert read(batch)[0] == ['<|bos|>pyes<|eos|>']
  full = make('pairs', [dict(prompt='p', chosen='yes!!', rejected='no')], max_length=7,
              overlong='truncate', batch_size=1).next_batch(None)[0]  # fmt: skip
  assert read(full)[0] == ['<|bos|>pyes!!']
  assert full.mask[0, 7] == 1


def test_margins_are_the_labels_of_pairs():
  data = [dict(r, margin=i) for i, r in enumerate(PAIRS)]
  batch, _ = make('pairs', data, wants=['labels']).next_batch(None)
  assert batch.labels.tolist() == [0, 0, 1, 0]


def test_a_rating_is_label_and_target():
  method = make('rated', RATED, wants=['labels', 'returns'])
  batch, _ = method.next_batch(None)
  assert batch.labels.tolist() == [-1.5, -0.5]
  assert read(batch) == [['<|bos|>pc<|eos|>'], ['<|bos|>pcc<|eos|>']]
  assert batch.returns[batch.mask == 1].tolist() == [-1.5, -0.5]
  assert (batch.returns[batch.mask == 0] == 0).all()
  assert (method.rows, method.group) == (2, 1)


def test_a_step_is_scored_behind_its_end():
  batch, _ = make('steps', STEPS, wants=['returns']).next_batch(None)
  assert read(batch) == [['<|bos|>pa', '<|bos|>pa\nbc<|eos|>']] * 2
  assert batch.returns[batch.mask == 1].tolist() == [1, 0, 1, 1]
  assert np.isfinite(batch.returns).all()
  assert batch.labels is None


def test_rows_of_padding_are_not_scored():
  batches = pipeline.make(
    sources.memory(records=PAIRS[:1]), BYTE, batch_size=2, max_length=16,
    records='pairs', epochs=1, drop_remainder=False,
  )  # fmt: skip
  batch = algorithm.readings(next(batches), pad_id=BYTE.pad_id)
  assert batch.mask.sum(-1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
  ('records', 'data', 'options', 'match'),
  [
    ('pairs', PAIRS, {'model': Plain}, 'no value head to train: add config.value'),
    ('documents', [dict(text='t')] * 4, {}, "config.data.records='documents'"),
    ('pairs', PAIRS, {'wants': ['labels']}, 'config.loss: no labels'),
    ('pairs', PAIRS, {'wants': ['returns']}, 'config.loss: no returns'),
  ],
)
def test_what_cannot_be_is_refused_before_the_first_batch(
  records, data, options, match
):
  with pytest.raises(ValueError, match=match):
    make(records, data, **options)


MARGINS = [dict(r, margin=i) for i, r in enumerate(PAIRS)]
JUDGED = [dict(r, rating=i / 3) for i, r in enumerate(RATED)]


@pytest.mark.parametrize(
  ('objective', 'records', 'data', 'match'),
  [
    ('bradley_terry', 'pairs', PAIRS, None),
    ('bradley_terry', 'rated', RATED, "'bradley_terry' reads pairs, and config.data.r"),
    (None, 'rated', RATED, "'bradley_terry' reads pairs, .*records='rated'; change"),
    ('bradley_terry', 'steps', STEPS, "reads pairs, .*records='steps'; change one"),
    ('regression', 'pairs', MARGINS, None),
    ('regression', 'pairs', PAIRS, "config.loss: .*objective='regression' needs rat"),
    ('regression', 'rated', RATED, None),
    ('regression', 'steps', STEPS, "'regression' reads pairs or rated, and config.da"),
    ('process', 'pairs', PAIRS, "'process' reads rated or steps, and config.data"),
    ('process', 'rated', JUDGED, None),
    ('process', 'rated', RATED, r"'process' reads ratings .*'rated' is -1\.5; set"),
    ('process', 'steps', STEPS, None),
    ('bt', 'pairs', PAIRS, "config.loss: reward_model: objective='bt' is not one of"),
  ],
)
def test_an_objective_reads_its_own_records(objective, records, data, match):
  setting = {} if objective is None else {'objective': objective}
  bound = functools.partial(reward_model.loss, **setting)
  make = functools.partial(algorithm.make, Valued, batches_of(records, data), bound)
  if match is None:
    make().next_batch(None)
    return
  with pytest.raises(ValueError, match=match):
    make()


def test_a_rating_that_is_no_probability_is_named_when_it_comes():
  data = [dict(prompt='p', completion=f'{i}', rating=i % 2) for i in range(20)]
  data[15]['rating'] = 4
  bound = functools.partial(reward_model.loss, objective='process')
  method = algorithm.make(Valued, batches_of('rated', data), bound)
  for _ in range(7):
    method.next_batch(None)
  with pytest.raises(ValueError, match=r"'process' reads .* is 4; set objective='regr"):
    method.next_batch(None)
