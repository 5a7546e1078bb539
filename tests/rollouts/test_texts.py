import functools

import jax
import jax.numpy as jnp
import pytest
import toy

from educe.data import tokenizer as tokenizer_lib
from educe.rollouts.texts import complete

KEY = jax.random.key(0)


@pytest.fixture(scope='module')
def tools():
  tokenizer = tokenizer_lib.load(path='byte')
  model, params = toy.model(vocabulary=tokenizer.vocab_size, max_length=64)
  # Letters and spaces, and now and then the end, so that every text is plain.
  params = params.at[:, jnp.array([ord(c) for c in 'abcdefgh '])].add(14)
  params = params.at[:, jnp.array(tokenizer.eos_ids)].add(13)
  return functools.partial(complete, model, params, tokenizer, key=KEY), tokenizer


def test_texts_are_the_tokens_without_the_stop_token(tools):
  run, tokenizer = tools
  rows = run(['abc', 'x', 'hello there'], max_new_tokens=20)
  assert any(row.stopped for row in rows)
  for row in rows:
    assert len(row.tokens) == len(row.logp)
    assert row.stopped == (row.tokens[-1] in tokenizer.eos_ids)
    written = row.tokens[:-1] if row.stopped else row.tokens
    assert row.text == bytes(written).decode()


def test_order_batches_and_padding_change_nothing(tools):
  run, _ = tools
  prompts = ['one', 'a much longer prompt than that', 'two', 'b' * 20, 'c']
  whole = run(prompts, max_new_tokens=10)
  small = run(prompts, max_new_tokens=10, batch_size=2)
  assert [row.text for row in small] == [row.text for row in whole]
  assert len({row.text for row in whole}) == 5


def test_messages_are_rendered_by_the_chat_template(tools):
  run, tokenizer = tools
  if tokenizer.chat_template is None:
    pytest.skip('the byte tokenizer has no chat template')
  messages = [{'role': 'user', 'content': 'hi'}]
  assert run([messages], max_new_tokens=3)[0].tokens != run(['hi'], max_new_tokens=3)


def test_a_stop_string_ends_the_text_and_stays_in_it(tools):
  run, _ = tools
  free = run(['abc'] * 4, max_new_tokens=20)
  assert len(free[0].text) > 3
  needle = free[0].text[1:3]
  rows = run(['abc'] * 4, max_new_tokens=20, stop=[needle])
  assert rows[0].stopped
  for row, whole in zip(rows, free, strict=True):
    cut = whole.text.find(needle)
    assert row.text == (whole.text if cut < 0 else whole.text[: cut + len(needle)])


def test_any_number_of_prompts_over_a_batch_compiles_nothing_new(tools, compilations):
  run, _ = tools
  with compilations() as first:
    run(['ab'] * 4, max_new_tokens=5, batch_size=4)
  assert first
  with compilations() as again:
    run(['ab', 'c', 'de'] * 3, max_new_tokens=5, batch_size=4)
  assert not again


def test_progress_is_shown_when_asked(tools, capsys):
  run, _ = tools
  run(['ab'], max_new_tokens=2)
  assert capsys.readouterr().err == ''
  run(['ab'], max_new_tokens=2, show='held out')
  assert 'held out' in capsys.readouterr().err


def test_nothing_to_do_and_bad_sizes(tools):
  run, _ = tools
  assert run([], max_new_tokens=2) == []
  with pytest.raises(ValueError, match='batch_size'):
    run(['a'], max_new_tokens=2, batch_size=0)
