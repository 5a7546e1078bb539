"""Prompts of a source, and no verdict."""

import pytest

from educe.environments import chain, prompts, verifiers

SOURCE = [{'prompt': f'Say {i}.', 'completion': str(i)} for i in range(40)]


def test_prompts_come_in_order_once_each_and_are_not_scored():
  world = prompts.make(source=[*SOURCE, *SOURCE[:5]])
  assert [x['prompt'] for x in world.prompts] == [x['prompt'] for x in SOURCE]
  assert len({x['id'] for x in world.prompts}) == 40
  assert world.prompts[3]['completion'] == '3'  # a judge may read the other columns
  assert world.prompts[3]['answer'] is None
  turn = verifiers.check(world.respond(world.prompts[0], ['anything']))
  assert (turn.reward, turn.done, turn.observation) == (None, True, None)
  assert verifiers.outcome(turn) == 'unparsable'


def test_size_takes_the_first_and_parts_share_nothing():
  assert len(prompts.make(source=SOURCE, size=7).prompts) == 7
  parts = [
    {x['prompt'] for x in prompts.make(source=SOURCE, part=part).prompts}
    for part in ('train', 'heldout', 'all')
  ]
  assert not parts[0] & parts[1]
  assert parts[0] | parts[1] == parts[2]
  assert 1 <= len(parts[1]) <= 16  # a fifth of 40, ± 3 standard deviations


def test_longest_counts_the_characters_of_all_messages():
  chat = [{'role': 'user', 'content': 'Say it'}, {'role': 'assistant', 'content': '!!'}]
  records = [{'prompt': 'Say 1.'}, {'prompt': 'Say it.'}, {'prompt': chat}]
  found = [x['prompt'] for x in prompts.make(source=records, longest=6).prompts]
  assert found == ['Say 1.']
  assert len(prompts.make(source=records, longest=8).prompts) == 3
  with pytest.raises(ValueError, match=r'has 1 different prompts .* longest=6 char'):
    prompts.make(source=records, size=2, longest=6)


def test_of_messages_the_last_answer_is_left_off():
  user, answer = ({'role': r, 'content': r} for r in ('user', 'assistant'))
  records = [{'messages': [user, answer]}, {'messages': [user, answer, user]}]
  found = [x['prompt'] for x in prompts.make(source=records).prompts]
  assert found == [[user], [user, answer, user]]
  # … and so it is where the turns are written as ShareGPT does.
  human, gpt = ({'from': f, 'value': f} for f in ('human', 'gpt'))
  (asked,) = prompts.make(source=[{'messages': [human, gpt]}]).prompts
  assert asked['prompt'] == [{'role': 'user', 'content': 'human'}]
  (asked,) = prompts.make(source=[{'prompt': [human]}]).prompts
  assert asked['prompt'] == [{'role': 'user', 'content': 'human'}]


@pytest.mark.parametrize(
  ('source', 'options', 'message'),
  [
    ([{'text': 'a'}], {}, r"source row 0 has no prompt, only \['text'\]"),
    ([{'prompt': 'a'}, {'prompt': '  '}], {}, 'source row 1: its prompt is empty'),
    ([{'prompt': 5}], {'longest': 9}, 'row 0: its prompt is 5: neither text nor'),
    ([{'prompt': ['a']}], {}, 'neither text nor messages'),
    ([{'messages': ['a', 'b']}], {}, 'neither text nor messages'),
    ([{'messages': 'ab'}], {}, 'neither text nor messages'),
    (SOURCE, {'size': 41}, 'size=41: the source has 40 different prompts'),
    (SOURCE, {'size': 0}, 'size must be at least 1'),
    (SOURCE, {'part': 'test'}, "part must be 'all', 'train' or 'heldout'"),
  ],
)
def test_bad_input(source, options, message):
  with pytest.raises(ValueError, match=message):
    prompts.make(source=source, **options)


def test_who_only_asks():
  assert prompts.only_asks(prompts.make(source=SOURCE))
  assert not prompts.only_asks(chain.make(depth=1))
