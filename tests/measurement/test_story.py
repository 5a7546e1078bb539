"""What a sequence of runs prints at its end."""

import json

from educe.measurement import story


def write(folder, key, *exams):
  folder.mkdir()
  lines = [{'step': 1, 'loss': 1.0}]
  lines += [
    {'step': i, key: a, f'{key}/low': a - 0.1, f'{key}/high': a + 0.1}
    for i, a in enumerate(exams)
  ]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)
  return folder


def test_a_story_is_told_of_those_that_were_measured(tmp_path):
  told = story.table([
    write(tmp_path / 'a', 'accuracy', 0.2, 0.3),
    write(tmp_path / 'b', 'accuracy'),
    write(tmp_path / 'c', 'accuracy', 0.3, 0.5),
    write(tmp_path / 'd', 'win_rate', 0.5, 0.6),
  ])  # fmt: skip
  assert [line.split() for line in told.splitlines()[1:]] == [
    ['before', '20.0%', '95', '%', '[10.0%,', '30.0%]'],
    ['a', '30.0%', '95', '%', '[20.0%,', '40.0%]'],
    ['c', '50.0%', '95', '%', '[40.0%,', '60.0%]'],
    [
      'd',
      '60.0%',
      '95',
      '%',
      '[50.0%,',
      '70.0%]',
      *['preferred', 'to', 'where', 'it', 'started'],
    ],
  ]


def test_agreement_with_judgements_is_told_from_accuracy(tmp_path):
  folder = write(tmp_path / 'gold', 'accuracy', 0.6)
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  exam = {**json.loads(lines[1]), 'preferences/margin': 0.1}
  (folder / 'metrics.jsonl').write_text(json.dumps(exam) + '\n')
  for line in story.table([folder]).splitlines()[1:]:
    assert line.endswith('of held-out judgements agreed with')
