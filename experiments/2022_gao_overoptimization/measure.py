"""Gold against √KL where a proxy of gold is optimised → results/<name>.json.

python experiments/2022_gao_overoptimization/measure.py cpu2

Everything but the `rloo` runs is exact: sums over all completions. Along the tilt
p_b ∝ p0·e^{b·proxy}, b = 1/β, all expectations are means over the prompts.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import sys

import numpy as np
import optimise
import world as worlds

from educe.environments import tabular
from educe.measurement import best_of_n

HERE = pathlib.Path(__file__).parent
PAIRS = (500, 2_000, 8_000, 60_000)
STRENGTHS = np.geomspace(0.01, 100, 61)  # b, nats per unit of reward
DRAWS = [round(2 ** (k / 2)) for k in range(2, 41)]  # n, to a million
SETTINGS = {
  'worlds': [10, 11, 12, 13],  # 0 to 3 were used to choose the world's constants
  'draws': 4,  # sets of preferences of each world and size
  'natural': {'betas': [0.0, 0.5, 1.0], 'steps': 100, 'rate': 0.1},
  'rloo': {
    'betas': [0.0, 0.5, 1.0],
    'steps': 600,
    'group': 256,
    'rate': 0.02,
    'damping': 3e-4,
    'every': 10,
  },
  'plain': {
    'betas': [0.0, 0.5, 1.0],
    'steps': 600,
    'group': 256,
    'rate': 0.3,
    'damping': None,
    'every': 10,
  },
}


def moments(policy, log_p0, gold, proxy) -> dict[str, float]:
  """Means over the prompts; corr is of gold and proxy under the policy, pooled."""
  mean = lambda x: float((policy * x).sum(-1).mean())  # noqa: E731
  g = gold - (policy * gold).sum(-1, keepdims=True)
  q = proxy - (policy * proxy).sum(-1, keepdims=True)
  spread = np.sqrt(mean(g * g) * mean(q * q))
  return {
    'd': float(np.sqrt(tabular.kl(policy, np.exp(log_p0)).mean())),
    'gold': mean(gold),
    'proxy': mean(proxy),
    'cov': mean(g * q),
    'corr': mean(g * q) / spread if spread > 1e-12 else 0.0,
    'spread': float(spread),
  }


def tilt(world, proxy) -> dict:
  """The curve over STRENGTHS, its peak, and how well d E[gold]/db = Cov holds."""
  p0 = np.exp(world.log_p0)

  def at(b):
    policy = tabular.gibbs(p0, proxy, 1 / b)
    return moments(policy, world.log_p0, world.gold, proxy)

  rows = [at(b) for b in STRENGTHS]
  slopes = np.array([slope(world, proxy, b) for b in STRENGTHS])
  curve = {name: np.array([row[name] for row in rows]) for name in rows[0]}
  top = int(curve['gold'].argmax())
  out = {name: curve[name].tolist() for name in ('d', 'gold', 'proxy', 'corr')}
  base = moments(p0, world.log_p0, world.gold, proxy)['spread']
  out['identity_error'] = float(np.abs(slopes - curve['cov']).max() / base)
  peak = {'b': float(STRENGTHS[top]), **rows[top], 'interior': False}
  if 0 < top < len(STRENGTHS) - 1:
    low, high = np.log(STRENGTHS[[top - 1, top + 1]])
    best = np.exp(highest(lambda x: at(np.exp(x))['gold'], low, high))
    root = np.exp(zero(lambda x: at(np.exp(x))['cov'], low, high))
    peak = {'b': best, 'root': root, **at(best), 'interior': True}
  peak['fall'] = float(peak['gold'] - curve['gold'][-1])
  return out | {'peak': peak}


def slope(world, proxy, b: float) -> float:
  """d E_b[gold]/db to the last digits, without any covariance: a complex step in b.

  For real-analytic f, Im f(b + ih)/h = f′(b) + O(h²), with nothing subtracted.
  """
  step = 1e-30
  logits = world.log_p0 + (b + 1j * step) * proxy
  weights = np.exp(logits - logits.real.max(-1, keepdims=True))
  gold = (weights * world.gold).sum(-1) / weights.sum(-1)
  return float(gold.imag.mean() / step)


def highest(f, low, high) -> float:
  """Where f has its one maximum, by golden sections: by values of f alone."""
  golden = (np.sqrt(5) - 1) / 2
  while high - low > 1e-9:
    a, b = high - golden * (high - low), low + golden * (high - low)
    low, high = (a, high) if f(a) < f(b) else (low, b)
  return float((low + high) / 2)


def zero(f, low, high) -> float:
  """Where f, positive at `low`, falls through 0, by halving; NaN: it does not."""
  if not f(low) > 0 > f(high):
    return float('nan')
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if f(middle) > 0 else (low, middle)
  return float((low + high) / 2)


def best_of(world, proxy) -> dict:
  """The exact best-of-n curve over DRAWS, with KL beside its formula."""
  p0 = np.exp(world.log_p0)
  rows = []
  for n in DRAWS:
    policy = best_of_n.policy(p0 / p0.sum(-1, keepdims=True), proxy, n)
    rows.append(moments(policy, world.log_p0, world.gold, proxy))
  out = {name: [row[name] for row in rows] for name in ('d', 'gold', 'proxy')}
  over = [d**2 - best_of_n.kl_bound(n) for d, n in zip(out['d'], DRAWS, strict=True)]
  return out | {'kl_over_bound': max(over), 'beyond': beyond(world, proxy, rows)}


def beyond(world, proxy, rows) -> float:
  """By how much a policy has more E[proxy] − β·KL than F allows: never, at any β."""
  p0 = np.exp(world.log_p0)
  most = -np.inf
  for b in STRENGTHS:
    limit = -tabular.free_energy(p0, proxy, 1 / b).mean()
    most = max(most, *(row['proxy'] - row['d'] ** 2 / b - limit for row in rows))
  return float(most)


def trained(world, proxy, settings) -> dict:
  """The optimisers of optimise.py at every β, along their training."""
  p0 = np.exp(world.log_p0)

  def seen(policies):
    rows = [moments(policy, world.log_p0, world.gold, proxy) for policy in policies]
    curve = {name: [row[name] for row in rows] for name in ('d', 'gold', 'proxy')}
    return curve | {'beyond': beyond(world, proxy, rows)}

  def apart(policy, b):
    return tabular.total_variation(policy, tabular.gibbs(p0, proxy, 1 / b))

  out: dict = {'natural': [], 'rloo': [], 'plain': []}
  exact = {**settings['natural']}
  for beta in exact.pop('betas'):
    policies = optimise.natural(world.log_p0, proxy, beta, **exact)
    b, most = 0.0, 0.0
    for policy in policies:  # each step adds rate·(proxy − β·b·proxy) to the logits
      b = b * (1 - exact['rate'] * beta) + exact['rate']
      most = max(most, float(apart(policy, b).max()))
    out['natural'].append({'beta': beta, 'b': b, 'apart': most, **seen(policies)})
  for kind in ('rloo', 'plain'):
    sampled = {**settings[kind]}
    for beta in sampled.pop('betas'):
      policies = [np.exp(x) for x in optimise.rloo(world, proxy, beta, **sampled)]
      end = float(apart(policies[-1], 1 / beta).mean()) if beta else None
      out[kind].append({'beta': beta, 'apart': end, **seen(policies)})
  return out


def measure(settings=SETTINGS, learn=worlds.reward_model, pairs=PAIRS) -> dict:
  """learn(world, pairs, seed) -> proxy `[P, N]`"""
  results: dict = {'settings': settings, 'tilt': [], 'best_of_n': [], 'control': []}
  for seed in settings['worlds']:
    world = worlds.world(seed)
    results['control'].append(tilt(world, world.gold)['peak'])
    for n, draw in itertools.product(pairs, range(settings['draws'])):
      proxy = learn(world, n, [seed, n, draw])
      which = {'world': seed, 'pairs': n, 'draw': draw}
      results['tilt'].append(which | tilt(world, proxy))
      if draw == 0:
        results['best_of_n'].append(which | best_of(world, proxy))
      if draw == 0 and n == pairs[0] and seed == settings['worlds'][0]:
        results['trained'] = which | trained(world, proxy, settings)
  return results


def rounded(x):
  """Curves to six digits, so that the results stay small; peaks and errors as they are."""
  if isinstance(x, dict):
    return {key: rounded(value) for key, value in x.items()}
  if isinstance(x, list) and x and isinstance(x[0], float):
    return [float(f'{value:.6g}') for value in x]
  return [rounded(value) for value in x] if isinstance(x, list) else x


if __name__ == '__main__':
  out = HERE / 'results' / f'{sys.argv[1]}.json'
  out.parent.mkdir(exist_ok=True)
  out.write_text(json.dumps(rounded(measure())) + '\n')
  print(out)
