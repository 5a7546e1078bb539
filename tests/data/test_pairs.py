"""What a preference record becomes, checked on text that can be read back."""

import re

import numpy as np
import pytest

from educe.data import pairs, tokenizer

BYTE = tokenizer.load(path='byte')
USER = [{'role': 'user', 'content': 'Q?'}]


def says(text, role='assistant'):
  return [{'role': role, 'content': text}]


def text(tokens):
  return BYTE.decode(tokens)


def rows(said):
  """(prompt, trained text of each completion)."""
  return text(said.prompt), *(text(c.tokens[c.mask == 1]) for c in said.completions)


def test_prompt_chosen_and_rejected_as_texts():
  said = pairs.encode(BYTE, dict(prompt='2+2=', chosen='4', rejected='five'), 'pairs')
  assert rows(said) == ('<|bos|>2+2=', '4<|eos|>', 'five<|eos|>')
  assert all(c.mask.all() for c in said.completions)
  assert said.labels is None


def test_prompt_chosen_and_rejected_as_messages():
  record = dict(prompt=USER, chosen=says('yes'), rejected=says('no')[0])
  said = pairs.encode(BYTE, record, 'pairs')
  assert text(said.prompt).endswith('Q?<|im_end|>\n<|im_start|>assistant\n')
  # Nothing stands behind the stop token, though the template writes a newline there.
  assert rows(said)[1:] == ('yes<|im_end|>', 'no<|im_end|>')
  assert all(c.mask.all() for c in said.completions)


@pytest.mark.parametrize(
  'prompt', [None, 'more', [*USER, *says('A.'), *says('more', 'user')]]
)
def test_the_common_messages_are_the_prompt(prompt):
  opening = [*USER, *says('A.'), *says('more', 'user')]
  record = dict(
    prompt=prompt,
    chosen=[*opening, *says('yes')],
    rejected=[*opening, *says('no'), *says('why?', 'user'), *says('so')],
  )
  said = pairs.encode(BYTE, record, 'pairs')
  alone = pairs.encode(
    BYTE, dict(prompt=opening, chosen=says('yes'), rejected=says('no')), 'pairs'
  )
  np.testing.assert_array_equal(said.prompt, alone.prompt)
  # Of the longer side both turns are trained, and what the user says is not.
  assert rows(said)[1:] == ('yes<|im_end|>', 'no<|im_end|>so<|im_end|>')
  assert 'why?' in text(said.completions[1].tokens)


def test_the_common_tokens_of_two_texts_are_the_prompt():
  record = dict(chosen='2+2=4, so', rejected='2+2=5')
  said = pairs.encode(BYTE, record, 'pairs')
  assert rows(said) == ('<|bos|>2+2=', '4, so<|eos|>', '5<|eos|>')


class Merging:
  """Texts in which 'b' before 'c' is one token with it: the end of a prompt moves."""

  add_bos, bos_id, eos_ids, chat_template = False, None, (9,), None
  pieces = ('a', 'b', 'bc', 'd', 'c')

  def encode_with_offsets(self, whole):
    ids, offsets, at = [], [], 0
    while at < len(whole):
      piece = 'bc' if whole.startswith('bc', at) else whole[at]
      ids.append(self.pieces.index(piece))
      offsets.append((at, at + len(piece)))
      at += len(piece)
    return ids, offsets

  def token_bytes(self, token):
    return self.pieces[token].encode() if token < 5 else b'.'


def test_both_rows_are_trained_from_the_same_token_on():
  record = dict(prompt='aab', chosen='cd', rejected='d')
  said = pairs.encode(Merging(), record, 'pairs')
  assert said.prompt.tolist() == [0, 0]
  assert [c.tokens.tolist() for c in said.completions] == [[2, 3, 9], [1, 3, 9]]
  assert all(c.mask.all() for c in said.completions)


class Rewriting(Merging):
  """Another first token in front of a 'd'."""

  def encode_with_offsets(self, whole):
    ids, offsets = super().encode_with_offsets(whole)
    return ([4, *ids[1:]], offsets) if whole.endswith('d') else (ids, offsets)


def test_prompts_that_are_written_differently_are_no_pair():
  record = dict(prompt='aaa', chosen='ca', rejected='cd')
  with pytest.raises(ValueError, match='prompt mismatch: the chat template'):
    pairs.encode(Rewriting(), record, 'pairs')


@pytest.mark.parametrize(
  ('ratings', 'expected'),
  [
    ({}, None),
    ({'margin': 2}, (2.0, 0.0)),
    ({'chosen_rating': 4.5, 'rejected_rating': 1}, (4.5, 1.0)),
    ({'margin': None, 'chosen_rating': 0, 'rejected_rating': 0}, (0.0, 0.0)),
  ],
)
def test_ratings_of_a_pair(ratings, expected):
  record = dict(prompt='p', chosen='a', rejected='b', **ratings)
  assert pairs.encode(BYTE, record, 'pairs').labels == expected


@pytest.mark.parametrize(
  'record',
  [
    dict(prompt=USER, completion=says('yes'), label=True),
    dict(messages=[*USER, *says('yes')], label=1),
    dict(messages=[*USER, {'from': 'gpt', 'value': 'yes'}], label=1),
  ],
)  # fmt: skip
def test_a_labelled_completion(record):
  said = pairs.encode(BYTE, record, 'unpaired')
  assert said.labels == (1.0,)
  assert rows(said)[1:] == ('yes<|im_end|>',)
  assert 'Q?' in rows(said)[0]


def test_a_rating_is_any_finite_number():
  record = dict(prompt='p', completion='c', rating=-2.5)
  assert pairs.encode(BYTE, record, 'rated').labels == (-2.5,)
  assert pairs.encode(BYTE, {**record, 'rating': True}, 'rated').labels == (1.0,)


@pytest.mark.parametrize('chat', [False, True])
def test_each_step_has_its_label_on_its_last_token(chat):
  steps = ['1+1=2', 'é=3', 'so 4']
  prompt = USER if chat else 'Q: '
  said = pairs.encode(
    BYTE, dict(prompt=prompt, completions=steps, labels=[True, 0, 1]), 'steps'
  )
  ends = np.flatnonzero(np.isfinite(said.targets))
  assert said.targets[ends].tolist() == [1, 0, 1]
  stop = '<|im_end|>' if chat else '<|eos|>'
  assert [text(said.completions[0].tokens[: end + 1]) for end in ends] == [
    '1+1=2', '1+1=2\né=3', f'1+1=2\né=3\nso 4{stop}',
  ]  # fmt: skip


@pytest.mark.parametrize('chat', [False, True])
@pytest.mark.parametrize('space', [' ', '\n\n', '\u3000', '\u2003\u3000'])
def test_a_step_ends_where_it_does_however_wide_the_space_before_it(space, chat):
  """White space of several bytes, which a template may trim and a text keeps."""
  record = dict(
    prompt=USER if chat else 'Q:', completions=[f'{space}ab', 'c'], labels=[0, 1]
  )
  said = pairs.encode(BYTE, record, 'steps')
  ends = np.flatnonzero(np.isfinite(said.targets))
  assert said.targets[ends].tolist() == [0, 1]
  assert text(said.completions[0].tokens[: ends[0] + 1]).strip() == 'ab'


PAIR = dict(prompt='p', chosen='a', rejected='b')
BAD = [
  ('pairs', dict(PAIR, rejected='a'), 'chosen and rejected are the same'),
  ('pairs', dict(PAIR, chosen=' \n'), 'chosen is empty'),
  ('pairs', dict(PAIR, rejected=''), 'rejected is empty'),
  ('pairs', dict(prompt=USER, chosen=says('a'), rejected=says('')), 'rejected is empty'),
  ('pairs', dict(prompt=USER, chosen=says('a'), rejected=says('a')), 'are the same'),
  ('pairs', dict(prompt=USER, chosen=says('a'), rejected='b'), 'both be texts or both'),
  ('pairs', dict(prompt='p', chosen='a'), "no column 'rejected'"),
  ('pairs', dict(chosen='ab', rejected='cd'), 'do not begin with a common token'),
  ('pairs', dict(chosen='ab', rejected='abc'), 'chosen is empty after the prompt'),
  ('pairs', dict(chosen=USER, rejected=[*USER, *says('a')]), 'chosen is empty after'),
  ('pairs', dict(chosen=[*USER, *says('a')], rejected=[*USER, *says('a')]), 'the same'),
  (
    'pairs',
    dict(
      chosen=[*says('Q', 'user'), *says('a')], rejected=[*says('R', 'user'), *says('b')]
    ),
    'prompt mismatch: chosen[0] differs from the other side and is of role',
  ),
  ('pairs', dict(chosen=says('a'), rejected=says('b')), 'prompt mismatch'),
  (
    'pairs',
    dict(prompt='R?', chosen=[*USER, *says('a')], rejected=[*USER, *says('b')]),
    "prompt mismatch: prompt is 'R?', but chosen and rejected both begin with 'Q?'",
  ),
  ('pairs', dict(PAIR, margin=-1), 'must not be negative'),
  ('pairs', dict(PAIR, chosen_rating=1, rejected_rating=2), 'swap the two'),
  ('pairs', dict(PAIR, chosen_rating=1), "no column 'rejected_rating'"),
  ('pairs', dict(PAIR, margin=float('nan')), 'margin=nan must be a finite number'),
  ('unpaired', dict(prompt='p', completion='c'), "no column 'label'"),
  ('unpaired', dict(prompt='p', completion='c', label=2), 'label=2 must be true or'),
  ('unpaired', dict(prompt='p', completion='', label=1), 'completion is empty'),
  ('unpaired', dict(prompt='p', completion=3, label=1), 'completion: expected a non-empty'),
  ('unpaired', dict(messages=USER, label=1), 'the last one must be what the assistant'),
  ('rated', dict(prompt='p', completion='c', rating='5'), "rating='5' must be a finite"),
  ('rated', dict(prompt='p', completion='c', rating=10**400), 'must be a finite'),
  ('rated', dict(prompt='p', completion='c', rating=1e39), 'rating=1e+39 must be'),
  ('pairs', dict(PAIR, margin=float('inf')), 'margin=inf must be a finite number'),
  ('pairs', dict(PAIR, chosen='\ud800'), 'chosen: text is not valid Unicode'),
  ('steps', dict(prompt='p', completions=['a'], labels=[1, 0]), '1 steps, labels 2'),
  ('steps', dict(prompt='p', completions=['a', ' '], labels=[1, 0]), 'completions[1]='),
  ('steps', dict(prompt='p', completions=['a'], labels=[0.5]), 'labels[0]=0.5 must be'),
  ('steps', dict(prompt='p', completions='ab', labels=[1]), 'completions: expected a'),
]  # fmt: skip


@pytest.mark.parametrize(('records', 'record', 'message'), BAD)
def test_a_bad_record_is_refused_in_one_line(records, record, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    pairs.encode(BYTE, record, records)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('records', ['pairs', 'unpaired', 'rated', 'steps'])
def test_without_bos_an_empty_prompt_is_refused(records):
  record = dict(
    prompt='', chosen='a', rejected='d', completion='a', label=1, rating=2,
    completions=['d'], labels=[1],
  )  # fmt: skip
  with pytest.raises(ValueError, match='prompt is empty, and this tokenizer writes no'):
    pairs.encode(Merging(), record, records)
