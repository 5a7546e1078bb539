"""GAE, group normalisation and the clipped loss: host, XLA, Pallas.

  python benchmarks/advantage.py [--repeats=21]

On this machine: GAE and GRPO's advantages from host arrays to host arrays, as an algorithm
asks for them, the ways in turns, medians. Then, with libtpu and without a chip, what the
compiler for TPUs makes of them: kernels launched (fusions, Pallas calls), copies, trips of
loops, and clock cycles. Of what XLA makes the cycles are its own estimate, which takes some
1,850 for a launch of nothing; of a Pallas call they are the instruction bundles of a grid
step × steps, without stalls. `least` is what any program must read and write. The last line
is one JSON object.
"""

import argparse
import functools
import glob
import importlib.util
import json
import math
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from timing import about, in_turns

from educe import topology
from educe.kernels.advantage import pallas, reference
from educe.losses import advantages, grpo
from educe.types import Batch, Scores

ROWS, TOKENS = 256, 2048
PROMPTS, GROUP = 512, 16
CHIPS = 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'


def group_normalised(rewards, ddof=1, eps=advantages.EPS):
  """losses.advantages.group_relative for XLA, `[P, G]`, float32."""
  scored = jnp.isfinite(rewards)

  def over_group(reduce, x, other):
    return reduce(jnp.where(scored, x, other), -1, keepdims=True)

  n = scored.sum(-1, keepdims=True)
  mean = over_group(jnp.sum, rewards, 0.0) / jnp.maximum(n, 1)
  differ = over_group(jnp.max, rewards, -jnp.inf) > over_group(
    jnp.min, rewards, jnp.inf
  )
  centred = jnp.where(scored & differ, rewards - mean, 0.0)
  squares = (centred**2).sum(-1, keepdims=True)
  return jnp.where(
    n > ddof, centred / (jnp.sqrt(squares / jnp.maximum(n - ddof, 1)) + eps), 0.0
  )


def associative_gae(rewards, values, mask, *, gamma, lam):
  """GAE as two of XLA's scans of logarithmic depth; without bootstraps and packing."""
  drawn = mask > 0
  r, v = jnp.where(drawn, rewards, 0.0), jnp.where(drawn, values, 0.0)
  scan = functools.partial(jax.lax.associative_scan, reverse=True, axis=1)
  _, found = scan(lambda b, a: (a[0] | b[0], jnp.where(a[0], a[1], b[1])), (drawn, v))
  delta = r + gamma * jnp.pad(found[:, 1:], ((0, 0), (0, 1))) - v
  steps = jnp.where(drawn, delta, 0.0), jnp.where(drawn, gamma * lam, 1.0)
  a, _ = scan(lambda b, a: (a[0] + a[1] * b[0], a[1] * b[1]), steps)
  a = jnp.where(drawn, a, 0.0)
  return a, a + v


def clipped_loss(logp, entropy, mask, old_logp, advantages):
  """Value, metrics and gradient of PPO's clipped objective, as losses/grpo.py has it."""

  def mean(logp):
    batch = Batch(tokens=mask, mask=mask, old_logp=old_logp, advantages=advantages)
    loss, metrics = grpo.loss(Scores(logp, entropy), batch)
    return loss.value, metrics

  return jax.value_and_grad(mean, has_aux=True)(logp)


def milliseconds(ways, repeats):
  return {name: 1e3 * each.wall for name, each in in_turns(ways, repeats).items()}


def by_associative_scan(*arrays):
  found = jax.jit(associative_gae, static_argnames=('gamma', 'lam'))(
    *arrays, gamma=1.0, lam=0.95
  )
  return jax.tree.map(np.float64, found)


def on_this_machine(repeats):
  rng = np.random.default_rng(0)
  found = {}
  for rows, tokens in ((32, 512), (ROWS, TOKENS)):
    r, v = rng.normal(size=(2, rows, tokens)).astype(np.float32)
    mask = np.float32(rng.random((rows, tokens)) < 0.7)
    ways = {
      name: functools.partial(advantages.gae, r, v, mask, implementation=name)
      for name in ('numpy', 'reference')
    }
    ways['associative'] = functools.partial(by_associative_scan, r, v, mask)
    found[f'gae {rows} × {tokens}'] = milliseconds(ways, repeats)
  r = rng.normal(size=PROMPTS * GROUP)
  on_device = jax.jit(group_normalised)
  ways = {
    'numpy': lambda: advantages.group_relative(r, GROUP),
    'reference': lambda: np.asarray(on_device(r.reshape(-1, GROUP).astype(np.float32))),
  }
  found[f'group normalisation {PROMPTS} × {GROUP}'] = milliseconds(ways, repeats)
  print(f'{"ms, median of " + str(repeats):36}{"numpy":>10}{"scan":>10}{"assoc.":>10}')
  for name, times in found.items():
    print(f'{name:36}' + ''.join(f'{x:10.2f}' for x in times.values()))
  return found


def for_a_tpu():
  """{chip: {what: figures}}; {} without libtpu."""
  if importlib.util.find_spec('libtpu') is None:
    print('libtpu is not installed: nothing to say of TPUs')
    return {}
  dump = tempfile.mkdtemp()
  os.environ['LIBTPU_INIT_ARGS'] = (
    f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true'
  )
  how = dict(gamma=1.0, lam=0.95)
  tokens, rewards = (ROWS, TOKENS), (PROMPTS, GROUP)
  programs = {
    'gae, scan': (functools.partial(reference.gae, **how), [tokens] * 3),
    'gae, associative': (functools.partial(associative_gae, **how), [tokens] * 3),
    'gae, pallas': (
      functools.partial(pallas.gae, interpret=False, **how),
      [tokens] * 3,
    ),
    'group normalisation': (group_normalised, [rewards]),
    'clipped loss': (clipped_loss, [tokens] * 5),
  }
  found: dict[str, dict] = {}
  for chip in CHIPS:
    device = topology.devices(chip)[0]
    on_chip = SingleDeviceSharding(device)
    print(
      f'\n{chip:22}{"kernels":>10}{"copies":>8}{"trips":>8}{"cycles":>12}{"least MB":>10}'
    )
    for name, (function, shapes) in programs.items():
      operands = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on_chip) for shape in shapes
      ]
      for path in glob.glob(f'{dump}/*'):
        os.remove(path)
      compiled = jax.jit(function).lower(*operands).compile()
      arrays = [*operands, *jax.tree.leaves(compiled.out_info)]
      row = read_program(compiled.as_text(), dump)
      row['least_bytes'] = 4 * sum(math.prod(x.shape) for x in arrays)
      found.setdefault(chip, {})[name] = row
      print(
        f'  {name:20}{row["kernels"]:10}{row["copies"]:8}{row["trips"]:8}'
        f'{row["cycles"]:12}{row["least_bytes"] / 1e6:10.2f}'
      )
  return found


def read_program(text, dump):
  """Kernels and copies, those in loops as often as they run; trips; cycles of it all."""
  whole = r'^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}'
  bodies = dict(re.findall(whole, text, re.M | re.S))

  def count(name):
    body = bodies[name]
    found = np.array(
      [
        len(re.findall(r' fusion\(', body)) + body.count('"tpu_custom_call"'),
        len(re.findall(r' copy(?:-start)?\(', body)),
        0,
        sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', body))),
      ]
    )
    loop = r' while\(.*condition=%([\w.-]+), body=%([\w.-]+)'
    for condition, inner in re.findall(loop, body):
      trips = max(map(int, re.findall(r' constant\((\d+)\)', bodies[condition])))
      found += trips * count(inner) + np.array([0, 0, trips, 0])
    return found

  entry = re.search(r'^ENTRY %([\w.-]+) ', text, re.M)
  assert entry is not None
  row = dict(
    zip(('kernels', 'copies', 'trips', 'cycles'), count(entry[1]).tolist(), strict=True)
  )
  steps = -(-ROWS // pallas.TILE[0]) * -(-TOKENS // pallas.TILE[1])
  for path in glob.glob(f'{dump}/*-gae.*-schedule-analysis_final_bundles.txt'):
    with open(path) as file:
      bundles = re.search(r'total scheduled bundles: *(\d+)', file.read())
    assert bundles is not None
    row['cycles'] += steps * int(bundles[1])
  return row


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=21)
  args = parser.parse_args()
  print(*about().values(), sep=', ')
  print(
    f'\nTPU programs: {ROWS} rows of {TOKENS} tokens, {PROMPTS} groups of {GROUP}, float32'
  )
  times = on_this_machine(args.repeats)
  programs = for_a_tpu()
  print()
  print(
    json.dumps(
      {
        'benchmark': 'advantage',
        'milliseconds': times,
        'tpu_programs': programs,
        'rows': ROWS,
        'tokens': TOKENS,
        **about(),
      }
    )
  )


if __name__ == '__main__':
  main()
