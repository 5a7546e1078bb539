"""Rounds of rollouts: prompts from a pool, groups of completions, verdicts, refills.

What every algorithm that trains on its own samples starts from. The position (pool,
round, and rollouts that were sampled but not yet trained on) survives a restart.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from educe import hosts
from educe.data.tokenizer import Tokenizer
from educe.environments import verifiers
from educe.environments.prompts import only_asks
from educe.models import value_head
from educe.progress import say
from educe.rollouts import judges, statistics, texts, transcripts
from educe.rollouts import server as server_lib
from educe.rollouts.collect import collect, fitting
from educe.rollouts.encoding import Round, decode, encode
from educe.rollouts.joining import replace_groups
from educe.rollouts.pool import Pool
from educe.rollouts.publishing import Publisher
from educe.types import Environment, Model, Params, Rollouts, StateMismatch

PATIENCE = 5  # rounds in a row without a signal before a warning


def make(
  model: Model,
  tokenizer: Tokenizer,
  environment: Environment,
  seed: int,
  judge: judges.Judge | None = None,
  run_dir: pathlib.Path | None = None,
  *,
  prompts: int,
  group: int,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  stop: Sequence[str] = (),
  batch_size: int = 64,
  pool: str = 'uniform',
  refills: int = 0,
  overlong_prompts: str = 'error',
  workers: int = 2,
  time_limit: float = 10.0,
  error_limit: float = 0.1,
  ahead: bool = False,
  show_every: int = 10,
  server: server_lib.Server | None = None,
) -> Rounds:
  """Rounds of `prompts` × `group` completions of up to `max_new_tokens` tokens.

  Args:
    judge: its scores of a round's completions, all at once, are their rewards; None:
      the environment's own.
    run_dir: where the weights for a server are exported to.
    temperature, top_k, top_p, min_p, stop: of the sampler; see rollouts/sampler.py.
    batch_size: completions sampled side by side; does not change what is sampled.
    pool: 'uniform', each prompt once an epoch, or 'adaptive', see rollouts/pool.py.
    refills: dynamic sampling (DAPO, §3.2, arXiv:2503.14476): groups whose rewards (the
      environment's, or the judge's) are all equal make room for new prompts, up to this
      many times a round. What is still equal then stays.
    overlong_prompts: 'error', or 'drop' those that leave no room for max_new_tokens.
    workers, time_limit (seconds a completion), error_limit: of the verifier's
      processes, see environments/verifiers.py; workers=0 judges in this process,
      without a limit of time. Several hosts have so many each, and judge a share each.
    ahead: sample the next round while this one is trained on, one round off policy; on
      one host.
    show_every: rounds between samples on the terminal; 0 shows none.
    server: an engine in another process that samples (rollouts/server.py), at the weights
      that are exported for it; with `ahead` all of that is done while training goes on.
      None samples here.

  Raises ValueError for values out of range, prompts that do not fit and an environment
  without prompts.
  """
  if ahead and hosts.count() > 1:
    raise ValueError(
      f'rollouts.ahead=True: {hosts.count()} processes would sample and train in threads '
      'of their own, and come to wait for each other in two orders; set it to False'
    )
  if prompts < 1 or group < 1:
    raise ValueError(f'rollouts: {prompts=} and {group=} must be at least 1')
  if pool not in ('uniform', 'adaptive'):
    raise ValueError(f"rollouts.pool={pool!r} must be 'uniform' or 'adaptive'")
  if refills < 0 or workers < 0 or show_every < 0:
    raise ValueError(f'rollouts: {refills=}, {workers=}, {show_every=} must be ≥ 0')
  if refills and group < 2:
    raise ValueError(
      f'rollouts.{refills=} replace groups whose rewards are all equal, as those of '
      f'{group=} always are; set it to 2 or more, or refills=0'
    )
  if not 0 < temperature < float('inf'):
    raise ValueError(f'rollouts.temperature={temperature} must be above 0: it divides')
  if max_new_tokens < 1:
    raise ValueError(f'rollouts.max_new_tokens={max_new_tokens} must be at least 1')
  if overlong_prompts not in ('error', 'drop'):
    raise ValueError(
      f"rollouts.overlong_prompts={overlong_prompts!r} must be 'error' or 'drop'"
    )
  publisher, generate = None, texts.generate
  if server is not None:
    server_lib.check(
      server, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    if run_dir is None:
      raise ValueError('rollouts.server: needs run_dir, to export the weights to')
    publisher = Publisher(server, model, tokenizer, run_dir)
    generate = functools.partial(server_lib.generate, server)
  every = [{'id': index, **record} for index, record in enumerate(environment.prompts)]
  records = fitting(model, tokenizer, every, max_new_tokens=max_new_tokens)
  if dropped := len(every) - len(records):
    much = (
      f'{dropped} of {len(every)} prompts leave no room for rollouts.max_new_tokens='
      f"{max_new_tokens} in the model's context of {model.architecture.max_length}"
    )
    if overlong_prompts == 'error':
      raise ValueError(f"{much}; lower it, or set rollouts.overlong_prompts='drop'")
    say(f'{much}: dropped')
  if not records:
    raise ValueError('rollouts: the environment has no prompts that fit')
  verifier, tally = None, verifiers.Tally(error_limit)
  if workers:
    verifier = verifiers.worker_pool(
      environment.respond,
      workers=workers,
      time_limit=time_limit,
      error_limit=error_limit,
    )

  def sample(params, chosen, key, *, group=group, temperature=temperature):
    asked = [records[index] for index in chosen]
    rollouts = collect(
      model,
      params,
      tokenizer,
      environment,
      asked,
      group=group,
      key=key,
      max_new_tokens=max_new_tokens,
      verifier=verifier,
      together=True,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      min_p=min_p,
      stop=stop,
      batch_size=batch_size,
      generate=generate,
    )
    if verifier is None:
      tally.add((row['outcome'], row.get('error')) for row in rollouts.transcripts)
    return judges.rewarded(rollouts, asked, judge) if judge else rollouts

  return Rounds(
    sample,
    Pool(len(records), seed=seed, adaptive=pool == 'adaptive'),
    verifier,
    seed=seed,
    prompts=prompts,
    group=group,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    refills=refills,
    ahead=ahead,
    show_every=show_every,
    compares=judge is not None and judges.compares(judge),
    scored=judge is not None or not only_asks(environment),
    publisher=publisher,
  )


@dataclasses.dataclass
class Rounds:
  """What `make` returns. `next(params, step)` is the next round."""

  _sample: Callable[..., Rollouts]
  _pool: Pool
  _verifier: Any
  seed: int
  prompts: int
  group: int
  max_new_tokens: int
  temperature: float
  refills: int
  ahead: bool
  show_every: int
  compares: bool = False  # rewards are relative to what was judged along with them
  scored: bool = True  # somebody gives rewards
  publisher: Publisher | None = None  # where an engine samples

  def __post_init__(self) -> None:
    self._number = 0  # of the next round to be sampled
    self._waiting: concurrent.futures.Future | None = None
    self._back: Round | None = None
    self._executor = concurrent.futures.ThreadPoolExecutor(1) if self.ahead else None
    self._dull = dict.fromkeys(('no_signal', 'cut_off'), 0)

  @property
  def behind(self) -> bool:
    """Rounds may come from an older policy than the one that trains on them."""
    return self.ahead or (self.publisher is not None and self.publisher.every > 1)

  def next(self, params: Params, step: int, *, greedy: bool = False) -> Round:
    """The next round. With `ahead` it was sampled by the policy of a round ago.

    params: with a value head or without; a sampler or an engine is given none
    greedy: also judge the greedy completion of each prompt (ReMax's baseline).
    """
    if self._back is not None:
      current, self._back = self._back, None
      return current
    params = value_head.without(params)
    waiting, self._waiting = self._waiting, None
    current = waiting.result() if waiting else self._round(params, step, greedy)
    stale = {'sampling/staleness_steps': step - current.step}
    current = current._replace(info={**current.info, **stale})
    if self._executor is not None:
      self._waiting = self._launch(params, step, greedy)
    self._look(current)
    return current

  def beside(self, params: Params, current: Round) -> Rollouts:
    """As many completions of another policy, of the same prompts, judged as well."""
    assert self.publisher is None, 'an engine serves one policy'
    key = jax.random.fold_in(jax.random.key(self.seed), current.number)
    key = jax.random.fold_in(key, 2 + self.refills)  # after what drew the round itself
    return self._sample(params, current.chosen, key)

  def must_score(self) -> None:
    """Raises ValueError where nobody gives rewards."""
    if not self.scored:
      raise ValueError(
        "config.environment.name='prompts' only asks, and nobody judges the answers: add "
        "config.judge, such as dict(name='reward_model', path='runs/reward')"
      )

  @contextlib.contextmanager
  def holding(self, current: Round) -> Iterator[None]:
    """If the block fails, the next round is this one again, also after a restart."""
    try:
      yield
    except BaseException:
      self._back = current
      raise

  def _launch(self, params, step, greedy):
    assert self._executor is not None
    # The update donates the params; whoever samples meanwhile needs its own, and those
    # for an engine become files.
    own = jax.device_get(params) if self.publisher else jax.tree.map(jnp.copy, params)
    return self._executor.submit(self._round, own, step, greedy)

  def _round(self, params, step, greedy) -> Round:
    before = self._pool.get_state()
    try:
      began = time.perf_counter()
      if self.publisher is None:
        return self._sampled(params, step, greedy)
      step = self.publisher(params, step, self._number)
      seconds = {'timing/export_seconds': time.perf_counter() - began}
      current = self._sampled(params, step, greedy)
      return current._replace(info={**current.info, **seconds})
    except BaseException:
      self._pool.set_state(before)  # nothing was learned from these prompts: once more
      raise

  def _sampled(self, params, step, greedy) -> Round:
    began = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(self.seed), self._number)
    chosen = self._pool.draw(self.prompts)
    rollouts = self._ask(params, chosen, jax.random.fold_in(key, 0))
    asked, first = len(chosen), statistics.summary(rollouts)
    for attempt in range(self.refills):
      silent = np.flatnonzero(statistics.equal(rollouts))
      if not len(silent):
        break
      # A power of two: few widths, so that few programs are compiled.
      wanted = 2 ** int(len(silent) - 1).bit_length()
      fresh = self._pool.draw(min(wanted, self.prompts))
      more = self._ask(params, fresh, jax.random.fold_in(key, 1 + attempt))
      asked += len(fresh)
      spoken = np.flatnonzero(~statistics.equal(more))
      for place, index in zip(silent, spoken, strict=False):
        chosen[place] = fresh[index]
      rollouts = replace_groups(rollouts, silent[: len(spoken)], more, spoken)
    baseline = None
    if greedy:
      key = jax.random.fold_in(key, 1 + self.refills)
      once = self._sample(params, chosen, key, group=1, temperature=0.0)
      baseline = np.asarray(once.rewards)
    info = {
      **first,  # before refills: what the policy does on prompts as they come
      'sampling/prompts': asked,
      'timing/rollout_seconds': time.perf_counter() - began,
    }
    number, self._number = self._number, self._number + 1
    return Round(rollouts, baseline, number, step, info, chosen)

  def _ask(self, params, chosen, key) -> Rollouts:
    rollouts = self._sample(params, chosen, key)
    self._pool.report(chosen, self.group, statistics.verified(rollouts))
    return rollouts

  def _look(self, current: Round) -> None:
    """A sample now and then; a warning when there has been nothing to learn from."""
    if self.show_every and current.number % self.show_every == 0:
      say(f'\n{transcripts.show(current.rollouts.transcripts, limit=1)}\n')
    r = current.rollouts
    # A completion alone is compared with the rest of the round, if with any.
    compared = r if r.group > 1 else r._replace(group=len(r.rewards))
    signs = {
      'no_signal': (
        bool(statistics.equal(compared).all()),
        'in every group all rewards are equal: nothing can be learned; choose easier '
        'or harder prompts, or a larger rollouts.group',
      ),
      'cut_off': (
        current.info['completions/clipped_ratio'] > 0.9,
        'over 90 % of completions are cut off before they end: raise '
        'rollouts.max_new_tokens, or look whether the model ever writes its stop token',
      ),
    }
    for name, (seen, warning) in signs.items():
      self._dull[name] = self._dull[name] + 1 if seen else 0
      times, rest = divmod(self._dull[name], PATIENCE)
      if not rest and times.bit_count() == 1:  # 1, 2, 4, …: said, and not droned
        say(f'warning: for {self._dull[name]} rounds {warning}')

  def get_state(self) -> dict[str, Any]:
    """A JSON-able dict; waits for the round that is being sampled."""
    waiting = self._waiting
    if (
      waiting is not None
    ):  # one that failed is sampled again, and fails where it is asked
      waiting = None if waiting.exception() else waiting.result()
    return {
      'seed': self.seed,
      'prompts': self.prompts,
      'group': self.group,
      'size': self._pool.size,
      'number': self._number,
      'pool': self._pool.get_state(),
      'waiting': None if waiting is None else encode(waiting),
      'back': None if self._back is None else encode(self._back),
      'published': None if self.publisher is None else self.publisher.step,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises StateMismatch if the state is of other prompts or other sizes."""
    here = {name: getattr(self, name) for name in ('seed', 'prompts', 'group')}
    for name, ours in {**here, 'size': self._pool.size}.items():
      if state[name] != ours:
        raise StateMismatch(
          f'rollouts were saved with {name}={state[name]} but this run has {ours}: it '
          'cannot continue exactly; restore the old value or start a new run'
        )
    self._number = state['number']
    self._pool.set_state(state['pool'])
    if self.publisher is not None:
      self.publisher.step = state.get('published')
    back = state.get('back')
    self._back = None if back is None else decode(back)
    self._waiting = None
    if state['waiting'] is not None:  # it is the next, even if `ahead` is off by now
      self._waiting = concurrent.futures.Future()
      self._waiting.set_result(decode(state['waiting']))

  def close(self) -> None:
    """Ends the verifier's processes."""
    if self._executor is not None:
      self._executor.shutdown(wait=True, cancel_futures=True)
    if self._verifier is not None:
      self._verifier.close()
