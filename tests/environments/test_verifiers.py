"""Judged in worker processes: in order, one Turn a sample, whatever the verifier does."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from educe.environments import verifiers
from educe.environments.verifiers import VerifierError, check, outcome, worker_pool
from educe.types import Turn


def respond(prompt, transcript):
  """Does what the completion says."""
  text = transcript[-1]
  if text == 'hang':
    time.sleep(600)
  if text == 'backtrack':  # holds the interpreter's lock: no thread could stop it
    re.fullmatch('(a|a)*b', 'a' * 60)
  if text == 'die':
    os.kill(os.getpid(), signal.SIGKILL)
  if text == 'die once' and not os.path.exists(prompt['flag']):
    open(prompt['flag'], 'w').close()
    os.kill(os.getpid(), signal.SIGKILL)
  if text == 'leave':
    sys.exit(3)
  if text == 'raise':
    raise KeyError('no\nsuch')
  if text == 'memory':
    bytearray(3 << 30)
  if text == 'print':
    print('noise\n' * 10, flush=True)
  if text == 'alarm':
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # raises outside a main thread
  if text.startswith('return '):
    return Turn(None, eval(text[7:]), True, {})
  right = text == prompt['answer']
  return Turn(
    None,
    float(right),
    True,
    {'outcome': 'verified' if right else 'wrong', 'pid': os.getpid()},
  )


def ask(verifier, *texts, **prompt):
  return verifier([({'answer': '5', **prompt}, [text]) for text in texts])


@pytest.fixture(scope='module')
def verifier():
  """error_limit=1: these tests fail on purpose."""
  with worker_pool(
    respond, workers=2, time_limit=1.5, memory_limit=2, error_limit=1
  ) as pool:
    yield pool


def test_turns_come_back_in_order_one_a_sample(verifier):
  texts = [str(i % 7) for i in range(200)]
  turns = ask(verifier, *texts)
  assert [t.reward for t in turns] == [float(t == '5') for t in texts]
  assert all(isinstance(t, Turn) and t.done and t.observation is None for t in turns)
  assert os.getpid() not in {t.info['pid'] for t in turns}
  assert ask(verifier) == []


def test_a_hang_is_killed_and_costs_only_itself(verifier):
  ask(verifier, '5')
  start = time.monotonic()
  turns = ask(verifier, '5', 'hang', '4', 'backtrack', '5', '5')
  assert time.monotonic() - start < 30  # two limits of 1.5 s and two new workers
  assert [t.info['outcome'] for t in turns] == [
    'verified', 'timeout', 'wrong', 'timeout', 'verified', 'verified'
  ]  # fmt: skip
  assert turns[1].reward is None
  assert turns[1].done
  assert '1.5 s' in turns[1].info['error']


def test_what_raises_is_an_error_with_its_message(verifier):
  bad, fine, left, memory = ask(verifier, 'raise', '5', 'leave', 'memory')
  assert bad.reward is None
  assert bad.done
  assert bad.info['outcome'] == 'error'
  assert "KeyError: 'no\\nsuch' (test_verifiers.py line" in bad.info['error']
  assert fine.reward == 1
  assert 'SystemExit: 3' in left.info['error']
  assert 'MemoryError' in memory.info['error']


def test_a_killed_worker_loses_nothing(verifier, tmp_path):
  turns = ask(verifier, '5', 'die once', 'die', '4', flag=str(tmp_path / 'flag'))
  assert [t.info['outcome'] for t in turns] == ['verified', 'wrong', 'error', 'wrong']
  assert 'signal 9' in turns[2].info['error']
  pids = {t.info['pid'] for t in ask(verifier, *'5' * 50)}
  for pid in pids:  # idle ones, between two calls
    os.kill(pid, signal.SIGKILL)
  turns = ask(verifier, *'5' * 50)
  assert [t.reward for t in turns] == [1.0] * 50
  assert not pids & {t.info['pid'] for t in turns}


def test_an_interrupted_call_leaves_no_verdict_for_the_next():
  """Ctrl-C in a notebook: a reply that nobody waited for is of another sample."""

  wait = verifiers._wait

  def interrupted(workers):
    if workers[0].sample == 1:  # it was sent, and has not been answered
      raise KeyboardInterrupt
    return wait(workers)

  with worker_pool(respond, workers=1) as verifier:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(verifiers, '_wait', interrupted)
      with pytest.raises(KeyboardInterrupt):
        ask(verifier, '4', '4')
    assert [outcome(turn) for turn in ask(verifier, '5')] == ['verified']


def test_what_a_verifier_prints_is_no_part_of_its_answer(verifier):
  assert [t.reward for t in ask(verifier, 'print', '5')] == [0.0, 1.0]


def test_a_verifier_runs_in_a_main_thread_where_alarms_work(verifier):
  assert ask(verifier, 'alarm')[0].info['outcome'] == 'wrong'


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ('float("nan")', 'reward is nan: return a finite'),
    ('float("inf")', 'reward is inf: return a finite'),
    ('-1e39', r'reward is -1e\+39: return a finite'),  # float32 has no such number
    ('10**400', r'reward is 10{79}: return a finite'),
    ('"1.0"', r"reward is '1.0' \(str\): return a float"),
    ('True', r'reward is True \(bool\): return a float'),
    ('[1.0, 0.0]', r'reward is \[1.0, 0.0\] \(list\)'),
  ],
)
def test_a_reward_that_is_none_is_an_error_on_one_line(verifier, value, message):
  turn = ask(verifier, f'return {value}')[0]
  assert turn.reward is None
  assert turn.info['outcome'] == 'error'
  assert re.search(message, turn.info['error'])
  assert '\n' not in turn.info['error']


def test_none_is_not_zero(verifier):
  turns = ask(verifier, 'return None', 'return 0.0', 'return 0', 'return 2')
  assert [t.reward for t in turns] == [None, 0.0, 0.0, 2.0]
  assert [outcome(t) for t in turns] == ['unparsable', 'wrong', 'wrong', 'verified']


@pytest.mark.parametrize(
  ('turn', 'message'),
  [
    (1.0, 'returned 1.0, expected a Turn'),
    (Turn(None, 1.0, True, None), 'info'),
    (Turn(None, 1.0, 1, {}), 'done'),
    (Turn(None, 1.0, False, {}), 'observation'),
    (Turn(None, 1.0, True, {'outcome': 'correct'}), 'must be one of'),
    (Turn(None, 1.0, True, {'rewards': [1.0]}), 'rewards.*dict'),
    (Turn(None, 1.0, True, {'rewards': {'style': False}}), "reward 'style' is False"),
    (Turn(None, np.bool_(True), True, {}), 'bool'),
    (Turn(None, np.ones(1), True, {}), 'ndarray'),
  ],
)
def test_turns_that_are_none_are_refused(turn, message):
  with pytest.raises(ValueError, match=message):
    check(turn)


def test_numpy_scalars_are_rewards():
  turn = check(Turn(None, np.float32(0.5), True, {'rewards': {'a': np.int64(1)}}))
  assert turn.reward == 0.5
  assert type(turn.reward) is type(turn.info['rewards']['a']) is float


def test_only_a_whole_reward_is_verified_unless_the_environment_says_so():
  """Partial credit is no solution: what is called accuracy counts this."""
  rewards = (None, -1.0, 0.0, 0.5, 0.999, 1.0, 2.5)
  judged = [outcome(Turn(None, reward, True, {})) for reward in rewards]
  assert judged == ['unparsable', *['wrong'] * 4, *['verified'] * 2]
  assert outcome(Turn(None, 1.0, True, {'outcome': 'wrong'})) == 'wrong'


def test_another_turn_may_follow():
  def converse(prompt, transcript):
    return Turn('and now?', None, len(transcript) > 1, {'seen': tuple(transcript)})

  with worker_pool(converse, workers=1) as verifier:
    first, last = verifier([({}, ['a']), ({}, ['a', 'b'])])
    assert first == Turn('and now?', None, False, {'seen': ['a']})
    assert last.done
    assert sum(verifier.counts.values()) == 1  # an unfinished turn has no outcome


def test_outcomes_are_counted_apart():
  with worker_pool(respond, workers=1, time_limit=1.0, error_limit=0.9) as verifier:
    ask(verifier, '5', '5', '4', 'hang', 'raise', 'return None')
    ask(verifier, '5')
    assert verifier.counts == dict(
      verified=3, wrong=1, unparsable=1, timeout=1, error=1, judged=0
    )


def test_too_many_errors_stop_the_run_and_are_quoted():
  with worker_pool(respond, workers=1, error_limit=0.1) as verifier:
    # Three are let pass, and so are four among forty; a fifth is not.
    ask(verifier, '5', 'raise', 'raise', 'raise')
    ask(verifier, *'5' * 35, 'raise')
    with pytest.raises(
      VerifierError, match=r'5 of the last 41 .*first: error: KeyError'
    ):
      ask(verifier, 'raise')


def test_timeouts_stop_the_run_too(monkeypatch):
  monkeypatch.setattr(verifiers, 'TOLERATED', 0)
  with worker_pool(respond, workers=1, time_limit=0.5, error_limit=0.5) as verifier:
    ask(verifier, 'hang', '5')  # a half is not more than a half
    with pytest.raises(VerifierError, match=r'2 of the last 3 .* timeout: no verdict'):
      ask(verifier, 'hang')


def test_a_verifier_that_only_raises_stops_at_once():
  with (
    worker_pool(respond, workers=1) as verifier,
    pytest.raises(VerifierError, match='KeyE'),
  ):
    ask(verifier, 'raise')


def test_old_errors_are_forgotten(monkeypatch):
  monkeypatch.setattr(verifiers, 'WINDOW', 8)
  with worker_pool(respond, workers=1, error_limit=0.5) as verifier:
    ask(verifier, *'5' * 8, *['raise'] * 4)
    ask(verifier, *'5' * 8)
    ask(verifier, *['raise'] * 4)  # 8 of 20 in all, 4 of the last 8
    with pytest.raises(VerifierError, match='5 of the last 8'):
      ask(verifier, 'raise')


def test_closing_leaves_no_process_not_even_a_grandchild():
  def bear(prompt, transcript):
    child = subprocess.Popen(['sleep', '600'])
    return Turn(None, 0.0, True, {'pids': [os.getpid(), child.pid]})

  with worker_pool(bear, workers=2) as verifier:
    turns = verifier([({}, [''])] * 4)
  deadline = time.monotonic() + 10
  for pid in {pid for turn in turns for pid in turn.info['pids']}:
    while _alive(pid) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not _alive(pid)
  verifier.close()  # twice is no harm
  with pytest.raises(ValueError, match='closed'):
    verifier([({}, [''])])


def _alive(pid: int) -> bool:
  """False for a zombie: an orphan is its new parent's to reap."""
  try:
    with open(f'/proc/{pid}/stat') as stat:
      return stat.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.mark.parametrize(
  'work', ['time.sleep(600)', 're.fullmatch("(a|a)*b", "a" * 60)']
)
def test_workers_do_not_outlive_a_killed_run(work):
  """A script, so the verifier is in __main__, as in a notebook."""
  script = f"""
    import os, re, time
    from educe.environments.verifiers import worker_pool
    from educe.types import Turn
    def respond(prompt, transcript):
      print(os.getpid(), flush=True)
      {work}
    if __name__ == '__main__':
      with worker_pool(respond, workers=1, time_limit=0.5) as verifier:
        verifier.time_limit = 600  # the outer clock is gone, as if it were killed
        verifier([({{}}, [''])])
  """
  run = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(script)],
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)},
  )
  with run:
    worker = int(run.stderr.readline())
    run.kill()
  deadline = time.monotonic() + 30
  while _alive(worker):
    assert time.monotonic() < deadline
    time.sleep(0.1)


def test_no_warning_where_jax_runs_and_no_backend_in_a_worker():
  """The suite turns warnings into errors, and JAX warns of a fork beside its threads."""
  import jax

  jax.numpy.ones(3).sum().block_until_ready()

  def look(prompt, transcript):
    from jax._src import xla_bridge

    return Turn(None, float(bool(xla_bridge._backends)), True, {})

  with worker_pool(look, workers=1) as verifier:
    assert verifier([({}, [''])])[0].reward == 0


def test_a_verifier_from_a_file_that_is_on_no_path(tmp_path):
  import importlib.util

  file = tmp_path / 'my_verifier.py'
  file.write_text(
    'from educe.types import Turn\n'
    'def score(text):\n  return float(len(text))\n'
    'def respond(prompt, transcript):\n'
    '  return Turn(None, score(transcript[-1]), True, {})\n'
  )
  spec = importlib.util.spec_from_file_location('my_verifier', file)
  module = importlib.util.module_from_spec(spec)
  sys.modules['my_verifier'] = module
  spec.loader.exec_module(module)
  try:
    with worker_pool(module.respond, workers=1) as verifier:
      assert verifier([({}, ['abc'])])[0].reward == 3
  finally:
    del sys.modules['my_verifier']


def test_text_of_any_kind_comes_through():
  def echo(prompt, transcript):
    info = {'answer': transcript[-1], 'tuple': prompt['tuple'] == (1, 2)}
    return Turn(None, 1.0, True, {**info, 'odd': {1j}})

  texts = ['é\n\x00', '\ud800', '{"ready": true}', 'a' * 3_000_000]
  with worker_pool(echo, workers=1) as verifier:
    turns = verifier([({'tuple': (1, 2)}, [text]) for text in texts])
  assert [t.info['answer'] for t in turns] == texts
  assert all(t.info['tuple'] and t.info['odd'] == '{1j}' for t in turns)


def test_a_verifier_that_cannot_start_is_one_line():
  lock = threading.Lock()
  with pytest.raises(ValueError, match=r'cannot be sent.*lock'):
    worker_pool(lambda prompt, transcript: lock)

  class Broken:
    def __reduce__(self):
      return int, ('no number',)

  with worker_pool(Broken(), workers=1) as verifier:  # noqa: SIM117
    with pytest.raises(VerifierError, match='cannot be loaded: ValueError: invalid'):
      verifier([({}, [''])])

  class Fatal:
    def __reduce__(self):
      return os._exit, (7,)

  with worker_pool(Fatal(), workers=1) as verifier:  # noqa: SIM117
    with pytest.raises(VerifierError, match=r'die while starting .exit status 7'):
      verifier([({}, [''])])


@pytest.mark.parametrize(
  'arguments',
  [dict(workers=0), dict(time_limit=0), dict(memory_limit=-1), dict(error_limit=2)],
)
def test_bad_limits_are_one_clear_line(arguments):
  name = next(iter(arguments))
  with pytest.raises(ValueError, match=f'{name}=.*must be') as error:
    worker_pool(respond, **arguments)
  assert '\n' not in str(error.value)


def test_workers_may_wait_for_their_first_sample_for_as_long_as_they_like(monkeypatch):
  """The limit is for loading, which begins with the first call, not for a long
  evaluation between the start of the workers and that."""
  with worker_pool(respond, workers=2) as verifier:
    monkeypatch.setattr(
      time, 'monotonic', lambda now=time.monotonic: now() + 2 * verifiers.START_LIMIT
    )
    assert [turn.reward for turn in ask(verifier, '5', '4')] == [1, 0]


def test_a_worker_that_never_gets_ready_is_one_line(monkeypatch):
  monkeypatch.setattr(verifiers, 'START_LIMIT', 0.5)

  class Slow:
    def __reduce__(self):
      return time.sleep, (60,)

  with worker_pool(Slow(), workers=1) as verifier:  # noqa: SIM117
    with pytest.raises(VerifierError, match=r'worker not ready in 0\.5 s'):
      ask(verifier, '5')
