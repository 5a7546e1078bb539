"""Sampling by an engine in another process, against scoring by the policy itself."""

import copy
import json
import socket
import threading
import time

import fake_engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.data import tokenizer as tokenizers
from educe.losses.logprobs import score
from educe.models import policy, presets, safetensors
from educe.rollouts import server, texts
from educe.rollouts.http_client import EndpointError
from educe.types import Batch

KEY = jax.random.key(3)
WORDS = tokenizers.load(path='byte')
IDS = [WORDS.encode(text) for text in ('one', 'a longer prompt', 'one', 'x')]


@pytest.fixture(scope='module')
def tools(tmp_path_factory):
  """(model, params, the folder they are in)."""
  model = policy.build(presets.debug)
  params = jax.jit(model.init)(jax.random.key(5))
  # A fresh model is nearly uniform, where a wrong temperature would hardly show, and ends
  # too seldom.
  params = {**params, 'head': params['head'] * 25}
  params['head'] = params['head'].at[:, jnp.array(WORDS.eos_ids)].mul(1.7)
  folder = tmp_path_factory.mktemp('served') / 'model'
  eos = {'bos_token_id': WORDS.bos_id, 'eos_token_id': WORDS.eos_ids}
  safetensors.export(folder, presets.debug, params, **eos)
  WORDS.save(folder)
  return model, params, folder


def connected(url, **changes):
  settings = dict(url=f'{url}/v1', model='policy', timeout=20.0, backoff=0.01)
  return server.connect(**(settings | changes))


def run(tools, to, ids=IDS, **options):
  options = {'key': KEY, 'max_new_tokens': 12, **options}
  return server.generate(to, tools[0], tools[1], WORDS, ids, **options)


def scored(tools, prompt, tokens, temperature):
  end = len(prompt) + len(tokens)
  row = np.zeros((1, 32), np.int32)  # one program for all
  row[0, :end] = [*prompt, *tokens]
  batch = Batch(jnp.asarray(row), jnp.ones(row.shape))
  read = jax.jit(lambda params: score(tools[0], params, batch, temperature=temperature))
  return np.asarray(read(tools[1]).logp)[0, len(prompt) : end]


@pytest.mark.parametrize('temperature', [1.0, 0.6])
def test_the_tokens_are_those_drawn_and_the_policy_scores_them_alike(
  tools, listen, temperature
):
  sent = []
  engine = fake_engine.Engine(tools[2], answer=lambda b, a: sent.append((b, a)) or a)
  to = connected(listen(engine), tempered=True)
  done = run(tools, to, temperature=temperature)
  sent = [(b['prompt'], a['choices'][0]['token_ids']) for b, a in sent]
  assert len(sent) == len(IDS)
  assert {x.stopped for x in done} == {True, False}
  for prompt, completion in zip(IDS, done, strict=True):
    assert (prompt, completion.tokens) in sent
    want = scored(tools, prompt, completion.tokens, temperature)
    np.testing.assert_allclose(completion.logp, want, atol=1e-4)
    assert completion.kept == [1.0] * len(completion.tokens)
    ended = completion.tokens[-1] in WORDS.eos_ids
    assert completion.stopped == ended
    assert ended or len(completion.tokens) == 12
    assert completion.text == WORDS.decode(
      completion.tokens, skip_special=True, continuation=True
    )
  assert done[0].tokens != done[2].tokens


def test_what_is_asked_is_said_in_full(tools, listen):
  engine = fake_engine.Engine(tools[2])
  to = connected(listen(engine))
  first = run(tools, to, seeds=[5, 6, 7, 8])
  asked = {(*body['prompt'],): body for body in engine.asked}
  body = asked[(*IDS[1],)]
  neutral = dict(
    top_p=1.0, top_k=-1, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, temperature=1.0, add_special_tokens=False,
  )  # fmt: skip
  assert neutral.items() <= body.items()
  assert body['stop_token_ids'] == list(WORDS.eos_ids)
  assert (body['model'], body['max_tokens'], body['stop']) == ('policy', 12, [])
  assert body['return_token_ids'] is True
  assert body['logprobs'] == 1

  def seeds():
    by_row = sorted((b['prompt'], b['seed']) for b in engine.asked)
    engine.asked.clear()
    return by_row

  before = seeds()
  assert len({seed for _, seed in before}) == 4
  assert all(0 <= seed < 2**31 for _, seed in before)
  # The same rows in another order and another company are the same samples.
  again = run(tools, to, ids=IDS[::-1], seeds=[8, 7, 6, 5], batch_size=1)
  assert [x.tokens for x in again[::-1]] == [x.tokens for x in first]
  assert seeds() == before
  run(tools, to, key=jax.random.key(4), seeds=[5, 6, 7, 8])
  assert not {seed for _, seed in seeds()} & {seed for _, seed in before}


def test_no_more_than_batch_size_rows_are_under_way(tools, listen):
  engine, now, most = fake_engine.Engine(tools[2]), [0], [0]

  def answer(path, body, headers):
    now[0] += 1
    most[0] = max(most[0], now[0])
    time.sleep(0.05)
    try:
      return engine(path, body, headers)
    finally:
      now[0] -= 1

  run(tools, connected(listen(answer)), ids=IDS * 2, batch_size=2)
  assert most[0] == 2


def test_a_greedy_completion_is_that_of_the_policy(tools, listen):
  engine = fake_engine.Engine(tools[2])
  done = run(tools, connected(listen(engine)), temperature=0.0)
  want = texts.generate(
    tools[0], tools[1], WORDS, IDS, key=KEY, max_new_tokens=12, temperature=0.0
  )
  assert [x.tokens for x in done] == [x.tokens for x in want]
  assert {body['temperature'] for body in engine.asked} == {0.0}


def said(tokens, logp=None, why='stop', **more):
  logp = [-1.0] * len(tokens) if logp is None else logp
  choice = {'token_ids': tokens, 'logprobs': {'token_logprobs': logp}}
  return {'choices': [{'text': '', 'finish_reason': why, **choice, **more}]}


def test_what_is_drawn_behind_the_end_is_left_out(tools, listen):
  """An engine may look for stop strings in another way, or draw several tokens at once."""
  tokens = [*WORDS.encode('and stop'), *WORDS.encode(' here'), *WORDS.eos_ids[:1]]
  logp = [-0.125 * i for i in range(len(tokens))]
  to = connected(listen(lambda path, body, headers: said(tokens, logp)))
  (done,) = run(tools, to, IDS[:1], stop=['stop'], max_new_tokens=20)
  assert (done.text, done.tokens) == ('and stop', tokens[:8])
  assert done.logp == logp[:8]
  assert done.stopped
  (done,) = run(tools, to, IDS[:1], max_new_tokens=20)
  assert (done.text, done.tokens) == ('and stop here', tokens)
  early = [97, WORDS.eos_ids[0], 98, 99]
  to = connected(listen(lambda path, body, headers: said(early, why='length')))
  (done,) = run(tools, to, IDS[:1], max_new_tokens=4)
  assert (done.tokens, done.stopped) == (early[:2], True)


END = WORDS.eos_ids[0]
BAD = {
  'text alone': (
    {'choices': [{'text': 'ab', 'finish_reason': 'stop'}]},
    'answers without token_ids, and its text is not tokenised again',
  ),
  'nothing': (said([]), 'answers without token_ids'),
  'no logprobs': (said([97, END], logprobs=None), 'no log-probs .* for 2 tokens'),
  'too few logprobs': (said([97, END], [-1.0]), '1 log-probs .* for 2 tokens'),
  'NaN': (said([97, END], [-1.0, float('nan')]), 'nan is no log-prob'),
  'infinite': (said([97, END], [float('-inf'), -1.0]), '-inf is no log-prob'),
  'null': (said([97, END], [None, -1.0]), 'None is no log-prob'),
  'logits': (said([97, END], [4.5, -1.0]), r'4\.5 is no log-prob.*--logprobs-mode'),
  'beyond the vocabulary': (said([264, END]), 'token 264 is not of the 264'),
  'negative': (said([-1, END]), 'token -1 is not of'),
  'no id': (said(['a', END]), "token 'a' is not of"),
  'a float': (said([97.0, END]), r'token 97\.0 is not of'),
  'too many': (said([97] * 6, why='length'), '6 tokens, of 5 asked for'),
  'cut short': (said([97, 98], why='length'), r'ended after 2 of 5.*--max-model-len'),
  'another end': (said([97, 98]), r"finish_reason 'stop'\) without an EOS"),
  'another prompt': (said([97, END], prompt_token_ids=[1, 2, 3, 4]), 'prompt of 4 tok'),
  'a prompt as long': (
    said([97, END], prompt_token_ids=[0] * len(IDS[0])),
    'that is not the one',
  ),
  'a huge number': (said([97, END], [-(10**400), -1.0]), 'is no log-prob'),
}


@pytest.mark.parametrize('name', BAD)
def test_an_answer_that_cannot_be_trained_on_is_one_line_at_once(tools, listen, name):
  answer, wrong = BAD[name]
  asked = []
  url = listen(lambda path, body, headers: asked.append(1) or copy.deepcopy(answer))
  with pytest.raises(EndpointError, match=wrong) as error:
    run(tools, connected(url), IDS[:1], max_new_tokens=5)
  assert str(error.value).startswith(f'rollouts.server policy at {url}/v1: ')
  assert '\n' not in str(error.value)
  assert len(asked) == 1


def drip(handler):
  handler.send_response(200)
  handler.end_headers()
  for _ in range(100):
    handler.wfile.write(b' ')
    handler.wfile.flush()
    time.sleep(0.02)


PASSING = {
  '500': (500, {}, b'out of memory'),
  '429': (429, {'Retry-After': '0'}, b''),
  'truncated': (200, {}, json.dumps(said([97, END])).encode()[:-20]),
  'no completion': {'object': 'error'},
  'empty': (200, {}, b''),
  'aborted': said([97], why='abort'),
  'drip': drip,
  'hung up': lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
}


@pytest.mark.parametrize('name', PASSING)
def test_what_passes_is_asked_again_and_not_for_ever(tools, listen, name):
  asked = []

  def answer(path, body, headers):
    asked.append(body)
    return said([97, END]) if len(asked) == 3 else PASSING[name]

  to = connected(listen(answer), timeout=0.3, retries=2)
  (done,) = run(tools, to, IDS[:1])
  assert done.tokens == [97, END]
  assert asked[0] == asked[1] == asked[2]  # seed and all
  to = connected(listen(lambda *_: PASSING[name]), timeout=0.3, retries=1)
  with pytest.raises(EndpointError, match=r'1 of 1 questions.*\(asked 2 times\)'):
    run(tools, to, IDS[:1])


def test_a_wrong_name_a_redirect_and_nobody_there_are_one_line(tools, listen):
  url = listen(fake_engine.Engine(tools[2], name='other'))
  look = r'look at rollouts\.server\.url, rollouts\.server\.model'
  with pytest.raises(EndpointError, match=f'HTTP 404 .*does not exist.*{look}'):
    run(tools, connected(url))
  there = {'Location': f'{url}/v1/completions'}
  away = listen(lambda *_: (302, there, b''))
  with pytest.raises(EndpointError, match=f'HTTP 302.*{look}'):
    run(tools, connected(away))
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  with pytest.raises(EndpointError, match=r'Connection refused \(asked 2 times\)'):
    run(tools, connected(f'http://127.0.0.1:{port}', retries=1))


def test_a_long_answer_has_room(tools, listen):
  """4 MiB hold a judge's answer, not that of 8,000 tokens with their log-probs."""
  padded = said([97] * 8000, why='length') | {'text_offset': 'x' * (5 << 20)}
  (done,) = run(
    tools, connected(listen(lambda *_: padded)), IDS[:1], max_new_tokens=8000
  )
  assert len(done.tokens) == 8000


@pytest.mark.parametrize(
  ('changes', 'wrong'),
  [
    (dict(url='here'), r'rollouts\.server\.url='),
    (dict(export_every=0), r'rollouts\.server\.export_every=0 must be at least 1'),
    (dict(reload='tgi'), r"reload='tgi' must be one of \['vllm', 'sglang'\]"),
    (dict(reload=('/update',)), r"reload: '/update' should be"),
    (dict(reload=(('update', {}),)), r'reload: .* should be'),
    (dict(api_key_env='EDUCE_NO_KEY'), r'rollouts\.server\.api_key_env'),
  ],
)
def test_settings_out_of_range(changes, wrong):
  settings = dict(url='http://localhost:8000/v1', model='m')
  server.connect(**settings)
  with pytest.raises(ValueError, match=wrong):
    server.connect(**(settings | changes))


@pytest.mark.parametrize(
  ('sampling', 'tempered', 'wrong'),
  [
    (dict(top_k=5), True, 'top_k=5.*leave them off'),
    (dict(top_p=0.9), True, 'leave them off'),
    (dict(min_p=0.1), True, 'leave them off'),
    (dict(temperature=0.7), False, r'temperature=0\.7.*server\.tempered=True'),
    (dict(temperature=0.7), True, None),
    ({}, False, None),
  ],
)
def test_log_probs_that_an_engine_would_not_tell_are_refused(sampling, tempered, wrong):
  to = server.connect(url='http://localhost:8000/v1', model='m', tempered=tempered)
  neutral = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
  if wrong is None:
    return server.check(to, **(neutral | sampling))
  with pytest.raises(ValueError, match=wrong):
    server.check(to, **(neutral | sampling))


def test_as_many_seeds_as_prompts(tools):
  to = server.connect(url='http://localhost:8000/v1', model='m')
  with pytest.raises(ValueError, match='1 seeds for 4 prompts'):
    run(tools, to, seeds=[1])


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_ask_for_shares_and_hear_of_all(
  tools, listen, as_processes, processes
):
  engine, now, most, lock = fake_engine.Engine(tools[2]), [0], [0], threading.Lock()

  def answer(*asked):
    with lock:
      now[0] += 1
      most[0] = max(most[0], now[0])
    try:
      time.sleep(0.02)
      return engine(*asked)
    finally:
      with lock:
        now[0] -= 1

  to, ids = connected(listen(answer)), IDS * 2
  alone = run(tools, to, ids)
  before, most[0] = list(engine.asked), 0
  engine.asked.clear()
  found = as_processes(processes, lambda i: run(tools, to, ids, batch_size=4))
  assert found == [alone] * processes
  assert sorted(map(str, engine.asked)) == sorted(map(str, before))  # once each
  assert most[0] <= 4  # of all of them together


def test_one_that_waits_in_vain_is_heard_by_all(tools, listen, as_processes):
  engine, over = fake_engine.Engine(tools[2]), threading.Event()

  def answer(path, body, headers):
    return over.wait(20) if '1' in headers['Authorization'] else engine(path, body, {})

  url = listen(answer)

  def one(index):
    to = connected(url, retries=0)
    key = f'process {index}'
    patient = to.client._replace(key=key, timeout=0.3 if index else 20.0)
    return run(tools, to._replace(client=patient))

  found = as_processes(2, one)
  over.set()
  first, second = map(str, found)
  assert 'no answer in 0.3 s (asked 1 times)' in second
  assert first == f'process 1: {second}'
  assert isinstance(found[0], ValueError)


@pytest.mark.parametrize(
  ('url', 'machines', 'refused'),
  [
    ('http://localhost:8000/v1', 'ab', True),
    ('http://127.0.0.1:8000/v1', 'ab', True),
    ('http://[::1]:8000/v1', 'ab', True),
    ('http://localhost:8000/v1', 'aa', False),
    ('http://localhost.cluster:8000/v1', 'ab', False),
    ('http://engine:8000/v1', 'ab', False),
  ],
)
def test_an_engine_that_is_another_one_on_each_machine_is_refused(
  as_processes, monkeypatch, url, machines, refused
):
  to = server.connect(url=url, model='m')
  neutral = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
  monkeypatch.setattr(
    server.socket, 'gethostname', lambda: machines[server.hosts.index()]
  )
  for error in as_processes(2, lambda i: server.check(to, **neutral)):
    assert (error is not None) == refused
    if refused:
      assert f'rollouts.server.url={url!r} is another engine on each of 2' in str(error)
