import random

import numpy as np
import pytest

from educe.rollouts.stop_strings import automaton


def walk(table, ids):
  """The number of tokens read when the stop string is complete, or None."""
  state = 0
  for index, token in enumerate(ids):
    state = table[state, token]
    if state == len(table) - 1:
      return index + 1
  return None


def test_found_inside_a_token_across_tokens_and_after_a_false_start():
  tokens = [b'a', b'b', b'aab', b'xaabx', b'', b'aa']
  table = automaton(['aab'], tokens)
  assert walk(table, [3]) == 1
  assert walk(table, [2]) == 1
  assert walk(table, [0, 4, 0, 4, 1]) == 5  # special tokens add nothing
  assert walk(table, [5, 0, 1]) == 3  # 'aaa' falls back to 'aa', not to the start
  assert walk(table, [0, 1, 0, 1]) is None


def test_agrees_with_substring_search_on_random_text():
  rng = random.Random(0)
  for _ in range(300):
    stop = [''.join(rng.choices('ab', k=rng.randint(1, 4))) for _ in range(3)]
    tokens = [''.join(rng.choices('abc', k=rng.randint(0, 5))) for _ in range(6)]
    table = automaton(stop, [text.encode() for text in tokens])
    ids = rng.choices(range(6), k=8)
    texts = [''.join(tokens[i] for i in ids[: n + 1]) for n in range(8)]
    first = next(
      (n + 1 for n, t in enumerate(texts) if any(s in t for s in stop)), None
    )
    assert walk(table, ids) == first, (stop, tokens, ids)


def test_a_character_split_into_bytes_is_found():
  table = automaton(['é'], [b'\xc3', b'\xa9', b'e'])
  assert walk(table, [2, 0, 1]) == 3
  assert walk(table, [0, 0, 2, 1]) is None


def test_memory_is_as_documented():
  table = automaton(['</answer>', '\n\n'], [b'x'] * 1000)
  assert table.dtype == np.int16
  assert table.nbytes <= (len('</answer>\n\n') + 2) * 1000 * 2


@pytest.mark.parametrize('stop', [[], [''], ['a', '']])
def test_empty_stop_strings_are_refused(stop):
  with pytest.raises(ValueError, match='must not be empty'):
    automaton(stop, [b'a'])
