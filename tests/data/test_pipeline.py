"""The stream is a function of its arguments: not of workers, not of interruptions."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from educe import paths
from educe.data import pipeline, sources, tokenizer

BYTE = tokenizer.load(path='byte')
# Uneven lengths, some over the 40 tokens that the tests allow.
RECORDS = [
  dict(prompt=f'p{i}', completion='c' * (i * 7 % 44 + 1), n=i) for i in range(37)
]


def make(data=RECORDS, **options):
  source = sources.memory(records=data) if isinstance(data, list) else data
  return pipeline.make(source, BYTE, **{**dict(batch_size=4, max_length=40), **options})


def take(batches, count):
  return [next(batches) for _ in range(count)]


def equal(one, two):
  assert len(one) == len(two)
  for a, b in zip(one, two, strict=True):
    assert set(a) == set(b)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)
      assert a[name].dtype == b[name].dtype


def record_of_rows(batches):
  return [int(row[0]) for batch in batches for row in batch['ids']]


FITS = {i for i, r in enumerate(RECORDS) if len(r['prompt'] + r['completion']) <= 38}


def test_shapes_types_and_content():
  batches = make()
  batch = next(batches)
  for name, values in batch.items():
    assert values.shape == (4, 40), name
    assert values.dtype == (np.float32 if name == 'mask' else np.int32)
  for row in range(4):
    record = RECORDS[batch['ids'][row, 0]]
    text = '<|bos|>' + record['prompt'] + record['completion'] + '<|eos|>'
    length = (batch['segments'][row] == 1).sum()
    assert BYTE.decode(batch['tokens'][row, :length]) == text
    trained = batch['tokens'][row][batch['mask'][row] == 1]
    assert BYTE.decode(trained) == record['completion'] + '<|eos|>'
  batches.close()


def test_an_epoch_holds_each_record_once_and_the_next_is_shuffled_anew():
  batches = make(batch_size=1)
  epochs = [record_of_rows(take(batches, len(FITS))) for _ in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(FITS)
    assert epoch != sorted(epoch)
  assert len(set(map(tuple, epochs))) == 3
  assert batches.counts() == dict(
    records=batches.counts()['records'],
    truncated=0,
    dropped_overlong=batches.counts()['records'] - 3 * len(FITS),
    dropped_masked=0,
  )
  assert 2.9 < batches.counts()['records'] / len(RECORDS) <= 3


def test_seed_and_shuffle():
  order = [
    record_of_rows(take(make(seed=seed, shuffle=shuffle), 5))
    for seed, shuffle in ((0, True), (0, True), (1, True), (0, False))
  ]
  assert order[0] == order[1]
  assert order[0] != order[2]
  assert order[3] == sorted(FITS)[:20]
  # Seed 1 does not merely run one epoch ahead of seed 0.
  zero, one = (make(batch_size=1, seed=seed) for seed in (0, 1))
  take(zero, len(FITS))
  assert record_of_rows(take(zero, 20)) != record_of_rows(take(one, 20))


@pytest.mark.parametrize('packing', [False, True])
def test_the_number_of_workers_changes_nothing(packing):
  streams = []
  for workers in (0, 2):
    batches = make(packing=packing, workers=workers, seed=3)
    streams.append(take(batches, 25))
    batches.close()
  equal(*streams)


def test_processes_share_out_the_records():
  """Together, the processes read what one alone would, and nothing twice."""
  shares = []
  for process in range(3):
    batches = make(batch_size=1, process_index=process, process_count=3, seed=5)
    records = []
    # An epoch of the whole, as this process sees it: 37 = 13 + 12 + 12 records.
    while True:
      (record,) = record_of_rows([next(batches)])
      if batches.counts()['records'] > (13 if process == 0 else 12):
        break
      records.append(record)
    shares.append(records)
  together = [record for share in shares for record in share]
  assert sorted(together) == sorted(FITS)


def test_processes_share_out_the_records_when_packing():
  records = [dict(text='x' * 5) for _ in range(640)]
  shares = []
  for process in range(2):
    batches = make(
      records, packing=True, batch_size=1, process_index=process, process_count=2
    )
    rows = take(batches, 64)  # the first set of bins: 64 × 5 documents, one epoch
    shares.append({int(i) for batch in rows for i in batch['ids'].ravel()} - {-1})
  assert not shares[0] & shares[1]
  assert shares[0] | shares[1] == set(range(640))


def test_global_order_does_not_depend_on_the_number_of_processes():
  records = [dict(text='x' * 5) for _ in range(24)]
  alone = record_of_rows(take(make(records, batch_size=6), 8))
  pair = [
    make(records, batch_size=3, process_index=p, process_count=2) for p in range(2)
  ]
  together = []
  for _ in range(8):
    rows = [record_of_rows([next(batches)]) for batches in pair]
    together += [record for both in zip(*rows, strict=True) for record in both]
  assert together == alone


def test_epochs_end_and_the_remainder():
  records = [dict(text='x' * (i + 1)) for i in range(10)]
  assert [len(b['ids']) for b in make(records, epochs=1)] == [4, 4]
  assert [len(b['ids']) for b in make(records, epochs=2)] == [4, 4, 4, 4, 4]
  kept = list(make(records, epochs=1, drop_remainder=False))
  assert [b['tokens'].shape for b in kept] == [(4, 40)] * 3
  assert record_of_rows(kept)[10:] == [-1, -1]
  assert sorted(record_of_rows(kept)[:10]) == list(range(10))
  packed = list(make(records, epochs=1, drop_remainder=False, packing=True))
  seen = {int(i) for batch in packed for i in batch['ids'].ravel()}
  assert seen == {*range(10), -1}


def test_overlong_records_are_counted():
  dropping = make(batch_size=1, epochs=1)
  assert len(list(dropping)) == len(FITS)
  assert dropping.counts()['dropped_overlong'] == 37 - len(FITS)
  cutting = make(batch_size=1, epochs=1, overlong='truncate')
  assert len(list(cutting)) == 37
  assert cutting.counts()['truncated'] == 37 - len(FITS)
  long_prompts = [dict(prompt='p' * 60, completion='c'), *RECORDS[:3]]
  masked = make(long_prompts, batch_size=1, epochs=1, overlong='truncate')
  assert len(list(masked)) == 3
  assert masked.counts()['dropped_masked'] == 1


@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize(('before', 'after'), [(0, 0), (2, 0), (0, 2)])
def test_state_continues_exactly(packing, before, after):
  """Also with another number of workers, and across two epochs."""
  whole = take(make(packing=packing), 30)
  for cut in (11, 0, 1, 22):
    batches = make(packing=packing, workers=before)
    take(batches, cut)
    state = json.loads(json.dumps(batches.get_state()))
    next(batches)  # what is read after the state was taken does not matter
    batches.close()
    again = make(packing=packing, workers=after)
    again.set_state(state)
    equal(take(again, 30 - cut), whole[cut:])
    again.close()
    if before or after:
      break  # one cut: processes are slow to start


def test_rewinding_a_used_iterator():
  batches = make(packing=True)
  start = batches.get_state()
  first = take(batches, 6)
  counts = batches.counts()
  batches.set_state(start)
  # A state taken right after restoring is the restored one, not a fresh iterator's.
  assert batches.get_state() == start
  equal(take(batches, 6), first)
  assert batches.counts() == counts
  middle = batches.get_state()
  assert middle != start
  other = make(packing=True)
  other.set_state(middle)
  assert other.get_state() == middle


SCRIPT = """
import hashlib, json, multiprocessing, os, signal, sys
from educe.data import pipeline, sources, tokenizer

def main(path, state, packing, workers, stop):
  batches = pipeline.make(
    sources.jsonl(path=path), tokenizer.load(path='byte'), batch_size=4,
    max_length=40, packing=packing, workers=workers, seed=9)
  if os.path.exists(state):
    with open(state) as f:
      saved = json.load(f)
    step = saved['step']
    batches.set_state(saved['data'])
  else:
    step = 0
  children = None
  while step < 24:
    batch = next(batches)
    digest = hashlib.md5(b''.join(batch[k].tobytes() for k in sorted(batch)))
    print(step, digest.hexdigest(), flush=True)
    step += 1
    if children is None:
      children = [p.pid for p in multiprocessing.active_children()]
      print('children', *children, flush=True)
    if step == stop:
      with open(state, 'w') as f:
        json.dump(dict(step=step, data=batches.get_state()), f)
    if step == stop + 3:
      os.kill(os.getpid(), signal.SIGKILL)
  batches.close()

if __name__ == '__main__':
  a = sys.argv
  main(a[1], a[2], a[3] == 'True', int(a[4]), int(a[5]))
"""


def run(*arguments):
  done = subprocess.run(
    [sys.executable, '-W', 'error', *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, 'XLA_FLAGS': ''},
  )
  lines = [line.split() for line in done.stdout.splitlines()]
  children = [int(pid) for line in lines if line[0] == 'children' for pid in line[1:]]
  digests = {int(line[0]): line[1] for line in lines if line[0] != 'children'}
  return done, digests, children


def alive(pid):
  try:
    return 'Z' not in pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2]
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.mark.skipif(not pathlib.Path('/proc').exists(), reason='reads /proc')
@pytest.mark.parametrize('packing', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
def test_killed_and_resumed_in_a_new_process(packing, workers, tmp_path):
  script, path, state = (tmp_path / name for name in ('run.py', 'r.jsonl', 's.json'))
  script.write_text(SCRIPT)
  path.write_text('\n'.join(map(json.dumps, RECORDS)))
  killed, first, children = run(script, path, state, packing, workers, 13)
  assert killed.returncode == -9
  assert len(children) == workers
  resumed, second, _ = run(script, path, state, packing, workers, -9)
  assert resumed.returncode == 0, resumed.stderr
  assert resumed.stderr == ''  # no noise from workers either
  assert sorted(first) == list(range(16))
  assert sorted(second) == list(range(13, 24))
  assert all(first[step] == second[step] for step in (13, 14, 15))
  whole = pipeline.make(
    sources.jsonl(path=str(path)),
    BYTE,
    batch_size=4,
    max_length=40,
    packing=packing,
    seed=9,
  )
  for step in range(24):
    batch = next(whole)
    digest = hashlib.md5(b''.join(batch[k].tobytes() for k in sorted(batch)))
    assert digest.hexdigest() == {**first, **second}[step], step
  assert whole.counts()['records'] > 2 * len(RECORDS)  # across epochs
  # Workers of the killed process are gone with it.
  for _ in range(50):
    if not any(map(alive, children)):
      break
    time.sleep(0.2)
  assert not any(map(alive, children))


def test_workers_outlive_a_signal_to_the_group_but_not_close():
  batches = make(workers=2)
  whole = take(make(), 12)
  first = take(batches, 1)
  children = [process.pid for process in multiprocessing.active_children()]
  assert len(children) == 2
  for pid in children:
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
  equal(first + take(batches, 11), whole)
  batches.close()
  assert not multiprocessing.active_children()
  with pytest.raises(ValueError, match='closed'):
    next(batches)


def test_orbax_saves_and_restores_it(tmp_path):
  batches = make(packing=True)
  take(batches, 3)
  with ocp.CheckpointManager(tmp_path) as manager:
    saved = grain.checkpoint.CheckpointSave(batches)
    manager.save(3, args=ocp.args.Composite(data=saved))
    manager.wait_until_finished()
    expected = take(batches, 5)
    again = make(packing=True)
    restored = grain.checkpoint.CheckpointRestore(again)
    manager.restore(3, args=ocp.args.Composite(data=restored))
  equal(take(again, 5), expected)


def test_a_state_of_something_else_is_refused():
  state = make().get_state()
  for name, other in (
    ('seed', make(seed=1)),
    ('max_length', make(max_length=41)),
    ('packing', make(packing=True)),
    ('records', make(RECORDS[:30])),
  ):
    with pytest.raises(ValueError, match=f'data state was saved with {name}='):
      other.set_state(state)
  make(workers=1, epochs=3).set_state(state)  # these change nothing that was read


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    (dict(batch_size=0), 'batch_size=0'),
    (dict(max_length=1), 'max_length=1'),
    (dict(workers=-1), 'workers=-1'),
    (dict(seed=-1), 'seed=-1'),
    (dict(epochs=0), 'epochs=0'),
    (dict(overlong='cut'), "overlong='cut'"),
    (dict(process_index=2, process_count=2), 'process_index=2'),
    (dict(epochs=1, process_count=2), 'epochs=1 with process_count=2'),
    (dict(process_count=99), 'too few for 99 processes'),
    (dict(data=()), 'data set is empty'),
    (
      dict(data=[dict(question='q')]),
      r"memory row 0: record has columns \['question'\]",
    ),
    (dict(data=[dict(text='a'), dict(text='')]), 'memory row 1: text'),
  ],
)
def test_errors_before_anything_is_read(options, match):
  with pytest.raises(ValueError, match=match):
    make(**options)


def test_a_source_without_places_has_its_records_counted():
  source = [dict(text='a'), dict(text='')]
  with pytest.raises(ValueError, match=r'^record 1: text: expected a non-empty'):
    pipeline.make(source, BYTE, batch_size=1, max_length=8)


@pytest.mark.parametrize('workers', [0, 1])
def test_errors_while_reading_name_the_record(workers):
  records = [dict(text='a') for _ in range(20)] + [dict(text='')]
  batches = make(records, shuffle=False, workers=workers)
  with pytest.raises(ValueError, match='memory row 20: text: expected a non-empty'):
    take(batches, 9)
  batches.close()


def test_nothing_left():
  batches = make([dict(text='x' * 99)] * 5)
  with pytest.raises(ValueError, match='a whole epoch was dropped'):
    next(batches)
  with pytest.raises(ValueError, match='3 records gave fewer than batch_size=4'):
    next(make(RECORDS[:3], epochs=1))


def test_real_gsm8k_packs_well():
  try:
    path = paths.resolve('data://gsm8k_train.jsonl.gz')
  except FileNotFoundError as error:
    pytest.skip(str(error))
  source = sources.jsonl(
    path=str(path),
    split='[:1500]',
    columns=dict(prompt='question', completion='answer'),
    chat=True,
  )
  batches = make(source, batch_size=8, max_length=2048, packing=True, epochs=1)
  rows = list(batches)
  full = np.mean([batch['segments'] > 0 for batch in rows[:-1]])
  assert full > 0.8
  seen = {int(i) for batch in rows for i in batch['ids'].ravel()} - {-1}
  assert len(seen) >= 1500 - batches.counts()['dropped_overlong'] - 8 * 20


PREFERENCES = {
  'pairs': [
    dict(prompt=f'p{i}', chosen='c' * (i * 7 % 44 + 1), rejected='r' * (i * 5 % 30 + 1))
    for i in range(37)
  ],
  'unpaired': [
    dict(prompt=f'p{i}', completion='c' * (i * 7 % 44 + 1), label=i % 3 == 0)
    for i in range(37)
  ],
  'rated': [
    dict(prompt=f'p{i}', completion='c' * (i + 1), rating=i) for i in range(37)
  ],
  'steps': [
    dict(prompt=f'p{i}', completions=['s' * (i + 1), 't'], labels=[1, i % 2])
    for i in range(37)
  ],
}


def preferences(records, data=None, **options):
  return make(data or PREFERENCES[records], records=records, **options)


@pytest.mark.parametrize('records', PREFERENCES)
def test_preferences_continue_exactly_with_any_number_of_workers(records):
  alone = preferences(records, overlong='truncate', max_prompt_length=20)
  whole = take(alone, 20)  # two epochs and more
  counts = alone.counts()
  first = preferences(records, overlong='truncate', max_prompt_length=20)
  equal(take(first, 11), whole[:11])
  state = json.loads(json.dumps(first.get_state()))
  next(first)
  again = preferences(records, overlong='truncate', max_prompt_length=20, workers=2)
  again.set_state(state)
  equal(take(again, 9), whole[11:])
  assert again.counts() == counts
  assert counts['truncated'] > 0
  again.close()


def test_a_pair_is_kept_or_dropped_whole():
  data = PREFERENCES['pairs']
  fits = [
    i for i, r in enumerate(data)
    if len(r['prompt']) + max(len(r['chosen']), len(r['rejected'])) <= 38
  ]  # fmt: skip
  batches = preferences('pairs', batch_size=1, epochs=1)
  seen = []
  for batch in batches:
    assert batch['tokens'].shape == (2, 40)
    record = batch['ids'][0, 0]
    texts = [
      BYTE.decode(tokens[mask == 1])
      for tokens, mask in zip(batch['tokens'], batch['mask'], strict=True)
    ]
    own = data[record]
    assert texts == [f'{own["chosen"]}<|eos|>', f'{own["rejected"]}<|eos|>']
    seen.append(int(record))
  assert sorted(seen) == fits
  assert batches.counts()['dropped_overlong'] == 37 - len(fits)


def test_every_mismatched_completion_is_the_next_kept_record_s():
  batches = preferences('unpaired', epochs=1)
  for batch in batches:
    own = batch['ids'][::2, 0]
    np.testing.assert_array_equal(batch['ids'][1::2, 0], own)
    mixed = batch['mask'][1::2] == 1
    others = [
      np.unique(ids[m]) for ids, m in zip(batch['ids'][1::2], mixed, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(others), np.roll(own, -1))
    np.testing.assert_array_equal(batch['labels'][::2], own % 3 == 0)
    assert np.isnan(batch['labels'][1::2]).all()


def test_pairs_truncated_to_nothing_are_counted():
  data = [
    dict(prompt='p', chosen='c' * 50 + 'a', rejected='c' * 50 + 'b'),
    dict(prompt='p', chosen='c' * 50, rejected='b'),
  ]
  batches = preferences('pairs', data, batch_size=1, epochs=1, overlong='truncate')
  (only,) = list(batches)
  assert (only['mask'].sum(-1) == [38, 2]).all()
  assert batches.counts()['truncated'] == 1
  assert batches.counts()['dropped_masked'] == 1
  assert batches.rows_of(0) is None
  np.testing.assert_array_equal(batches.rows_of(1)['tokens'], only['tokens'])
  with pytest.raises(ValueError, match='a whole epoch was dropped'):
    next(preferences('pairs', data[:1], batch_size=1, overlong='truncate'))


def test_ratings_are_of_all_pairs_or_of_none():
  data = [dict(r, margin=1.0) for r in PREFERENCES['pairs']]
  rated = preferences('pairs', data)
  assert rated.has_labels
  assert next(rated)['labels'].tolist() == [1, 0] * 4
  assert not preferences('pairs').has_labels
  for broken, what in ((data, 'not rated'), (PREFERENCES['pairs'], 'rated')):
    other = [dict(r, margin=None if what == 'not rated' else 1.0) for r in data[:1]]
    with pytest.raises(ValueError, match=f'memory row 5: {what}, unlike memory row 0'):
      preferences('pairs', [*broken[:5], *other, *broken[6:]])


@pytest.mark.parametrize(
  ('records', 'options', 'match'),
  [
    ('triples', {}, r"records='triples' is not known; choose one of \['documents', 'pa"),
    ('pairs', {'packing': True}, "packing=True is of documents, not of records='pairs'"),
    ('pairs', {'max_prompt_length': 8}, "set overlong='truncate'"),
    ('pairs', {'max_prompt_length': 40, 'overlong': 'truncate'}, r'in 1..max_length−1=39'),
    ('unpaired', {'batch_size': 1}, 'needs another one in its batch'),
    ('unpaired', {'drop_remainder': False}, 'needs another one in its batch'),
  ],
)  # fmt: skip
def test_what_preferences_cannot_be(records, options, match):
  with pytest.raises(ValueError, match=match):
    make(PREFERENCES.get(records, RECORDS), records=records, **options)


@pytest.mark.parametrize('label', [True, 0])
def test_labels_that_are_all_the_same_are_refused(label):
  data = [dict(r, label=label) for r in PREFERENCES['unpaired']]
  with pytest.raises(ValueError, match=f'label: {label} throughout the data set'):
    preferences('unpaired', data)
  preferences('unpaired', [*data, dict(data[0], label=not label)]).close()


def test_ratings_that_are_all_the_same_are_refused():
  data = [dict(r, rating=2.5) for r in PREFERENCES['rated']]
  with pytest.raises(
    ValueError, match=r'rating: 2\.5 throughout the data set: from eq'
  ):
    preferences('rated', data)
  preferences(
    'rated', data, learns=False
  ).close()  # to be judged by them is another thing
  preferences('rated', [*data, dict(data[0], rating=2)]).close()


def test_steps_that_are_all_judged_the_same_are_refused():
  data = [dict(r, labels=[1, 1]) for r in PREFERENCES['steps']]
  with pytest.raises(ValueError, match='labels: 1 throughout the data set'):
    preferences('steps', data)
  preferences('steps', [*data, dict(data[0], labels=[1, 0])]).close()


def test_a_bad_pair_is_named_wherever_it_stands():
  data = [*PREFERENCES['pairs'][:20], dict(prompt='p', chosen='a', rejected='a')]
  with pytest.raises(
    ValueError, match='memory row 20: chosen and rejected are the same'
  ):
    preferences('pairs', data, batch_size=1, epochs=1)


class Flaky:
  """RECORDS on a disk that is away for a moment: once, where `away` says."""

  fingerprint, away = 'flaky', None

  def __len__(self):
    return len(RECORDS)

  def __getitem__(self, index):
    if index == self.away:
      self.away = None
      raise OSError('the disk is away')
    return RECORDS[index]


@pytest.mark.parametrize('options', [dict(), dict(packing=True)])
def test_a_batch_that_could_not_be_read_is_read_again(options):
  whole = take(make(Flaky(), **options), 8)
  source = Flaky()
  batches = make(source, **options)
  source.away = int(whole[3]['ids'].max())
  seen: list = []

  def read():
    for _ in range(8):
      with batches.holding():
        seen.append(next(batches))

  with pytest.raises(OSError, match='the disk is away'):
    read()
  assert len(seen) < 8
  equal(seen, whole[: len(seen)])
  again = make(Flaky(), **options)
  again.set_state(json.loads(json.dumps(batches.get_state())))
  for there in (batches, again):
    equal(take(there, 8 - len(seen)), whole[len(seen) :])


def test_a_batch_that_was_read_and_refused_comes_again():
  batches = make(RECORDS)
  next(batches)
  refused = []

  def refuse():
    with batches.holding():
      refused.append(next(batches))
      raise ValueError('no')

  with pytest.raises(ValueError, match='no'):
    refuse()
  equal([next(batches)], refused)


def test_pairs_are_not_continued_as_something_else():
  state = preferences('pairs').get_state()
  with pytest.raises(ValueError, match="records_as='pairs'"):
    make([dict(r, completion=r['chosen']) for r in PREFERENCES['pairs']]).set_state(
      state
    )
