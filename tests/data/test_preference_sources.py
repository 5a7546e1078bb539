"""Public preference data: small files of their shape, and the real ones where present."""

import json

import pytest

from educe import paths
from educe.data import pairs, pipeline, sources, tokenizer
from educe.data import preference_sources as public

BYTE = tokenizer.load(path='byte')


def write(tmp_path, *rows):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(json.dumps(row) for row in rows))
  return str(path)


def turns(messages):
  return [(m['role'], m['content']) for m in messages]


def test_hh_rlhf_dialogues_become_messages(tmp_path, capsys):
  opening = (
    '\n\nHuman: hi\n\nAssistant: Hello\n\n  there.\n\nAssistant: So?\n\nHuman: why '
  )
  path = write(
    tmp_path,
    dict(chosen=f'{opening}\n\nAssistant: a', rejected=f'{opening}\n\nAssistant: b'),
    dict(chosen=f'{opening}\n\nAssistant:', rejected=f'{opening}\n\nAssistant: b'),
    # Two answers in a row are one; so the prompts are the same.
    dict(
      chosen='\n\nHuman: q\n\nAssistant: a',
      rejected='\n\nHuman: q\n\nAssistant: b\n\nAssistant: c',
    ),
  )
  source = public.hh_rlhf(path=path, system='Be kind.')
  assert len(source) == 2
  assert turns(source[0]['prompt']) == [
    ('system', 'Be kind.'), ('user', 'hi'), ('assistant', 'Hello\n\n  there.\n\nSo?'),
    ('user', 'why'),
  ]  # fmt: skip
  assert turns(source[0]['chosen']) == [('assistant', 'a')]
  assert turns(source[1]['rejected']) == [('assistant', 'b\n\nc')]
  assert 'may be offensive or upsetting' in capsys.readouterr().err


def test_the_publishers_warning_is_said_when_the_data_are_read(tmp_path, capsys):
  path = write(
    tmp_path,
    dict(
      chosen='\n\nHuman: q\n\nAssistant: a', rejected='\n\nHuman: q\n\nAssistant: b'
    ),
  )
  public.hh_rlhf(path=path)
  said = ' '.join(''.join(capsys.readouterr()).split())
  assert 'The data contain content that may be offensive or upsetting' in said


def test_hh_rlhf_pairs_of_two_prompts_are_named(tmp_path):
  path = write(
    tmp_path,
    dict(
      chosen='\n\nHuman: q\n\nAssistant: a', rejected='\n\nHuman: r\n\nAssistant: b'
    ),
  )
  with pytest.raises(ValueError, match=r'rows.jsonl row 0: prompt mismatch'):
    pipeline.make(
      public.hh_rlhf(path=path), BYTE, batch_size=1, max_length=99, records='pairs'
    )


@pytest.mark.parametrize(
  ('votes', 'ratings'),
  [
    ((2, 2, 2), (1, 0)),
    ((1, 2, 2), (2 / 3, 1 / 3)),
    ((2, 0, 2), (5 / 6, 1 / 6)),
    ((0, 2, 0), None),
    ((0, 1, 2), None),
  ],
)
def test_pandalm_takes_the_majority(votes, ratings, tmp_path):
  row = dict(
    instruction='I', input='x', response1=True, response2='no', cmp_key='a_b',
    **{f'annotator{i}': vote for i, vote in enumerate(votes, 1)},
  )  # fmt: skip
  other = row | dict(annotator1=1, annotator2=1, annotator3=1, input='')
  source = public.pandalm(path=write(tmp_path, row, other), chat=False)
  assert len(source) == 1 + (ratings is not None)
  assert source[-1] == dict(
    prompt='I', chosen='True', rejected='no', chosen_rating=1, rejected_rating=0,
    models='a_b',
  )  # fmt: skip
  if ratings:
    assert (source[0]['chosen'], source[0]['rejected']) == ('no', 'True')
    assert source[0]['prompt'] == 'I\n\nx'
    got = source[0]['chosen_rating'], source[0]['rejected_rating']
    assert got == pytest.approx(ratings)


def test_pandalm_leaves_out_empty_answers(tmp_path):
  row = dict(
    instruction='I', input='', response1='a', response2='\n', cmp_key='',
    annotator1=1, annotator2=1, annotator3=1,
  )  # fmt: skip
  full = row | dict(response2='b')
  absent = row | dict(response2=None)  # which is no answer 'None'
  assert len(public.pandalm(path=write(tmp_path, row, full, absent))) == 1


def test_llmbar(tmp_path):
  row = dict(subset='Natural', input='Q', output_1='a', output_2='b', label=2)
  (record,) = public.llmbar(path=write(tmp_path, row))
  assert turns(record['prompt']) == [('user', 'Q')]
  assert turns(record['chosen']) == [('assistant', 'b')]
  assert turns(record['rejected']) == [('assistant', 'a')]


def test_gsm8k_solutions_are_one_record_each(tmp_path):
  row = dict(
    question='Q', ground_truth='A: 2',
    small=dict(solution='A: 1', is_correct=False),
    large=dict(solution='A: 2', is_correct=True),
  )  # fmt: skip
  source = public.gsm8k_solutions(
    path=write(tmp_path, row), chat=False, columns=dict(rating='label')
  )
  assert list(source) == [
    dict(prompt='Q', completion='A: 1', rating=False, model='small'),
    dict(prompt='Q', completion='A: 2', rating=True, model='large'),
  ]


def test_another_file_is_refused_with_its_line(tmp_path):
  path = write(tmp_path, dict(question='Q'))
  for read in (public.hh_rlhf, public.pandalm, public.llmbar):
    with pytest.raises(ValueError, match='line 1: not a record of this data set'):
      read(path=path)


def test_the_fingerprint_is_the_file_s(tmp_path):
  row = dict(subset='Natural', input='Q', output_1='a', output_2='b', label=2)
  one = public.llmbar(path=write(tmp_path, row))
  two = public.llmbar(path=write(tmp_path, row, row))
  assert None not in (one.fingerprint, two.fingerprint)
  assert one.fingerprint != two.fingerprint


REAL = {
  'hh_rlhf': (public.hh_rlhf, {}, 'pairs', 2308),
  'pandalm': (public.pandalm, {}, 'pairs', 842),
  'llmbar': (public.llmbar, {}, 'pairs', 419),
  'gsm8k_solutions': (public.gsm8k_solutions, {}, 'unpaired', 5276),
  'dpo_demo': (
    sources.jsonl,
    dict(path='data://dpo_demo.jsonl.gz', columns=dict(prompt='conversations')),
    'pairs',
    300,
  ),
  'kto_demo': (sources.jsonl, dict(path='data://kto_demo.jsonl.gz'), 'unpaired', 300),
}


@pytest.mark.parametrize('name', REAL)
def test_real_data_encode(name):
  if paths.data_root() is None:
    pytest.skip('no data folder on this machine')
  make, options, records, count = REAL[name]
  source = make(**options)
  assert len(source) == count
  worth = set()
  for index in range(0, count, 1 + count // 300):
    said = pairs.encode(BYTE, source[index], records)
    assert len(said.prompt) > 2
    assert all(c.mask[0] == c.mask[-1] == 1 for c in said.completions)
    worth.add(said.labels)
  kinds = {'pandalm': 3, 'gsm8k_solutions': 2, 'kto_demo': 2}
  assert len(worth) == kinds.get(name, 1)
  if name == 'gsm8k_solutions':
    assert sum(record['label'] for record in source) == 2001


def test_the_raw_texts_of_hh_rlhf_are_pairs_of_an_implicit_prompt():
  if paths.data_root() is None:
    pytest.skip('no data folder on this machine')
  source = sources.jsonl(path='data://hh_rlhf_harmless_test.jsonl.gz', split='[:40]')
  for record in source:
    said = pairs.encode(BYTE, record, 'pairs')
    assert BYTE.decode(said.prompt).startswith('<|bos|>\n\nHuman: ')
