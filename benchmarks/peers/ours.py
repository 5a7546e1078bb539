"""educe's side of peers.py: the step, the batches and the sampler that a run uses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import worker

from educe import memory, sharding
from educe.data.sharing import restore, share
from educe.losses import dpo, grpo, sft
from educe.losses.logprobs import score
from educe.models import safetensors
from educe.rollouts import sampler
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import Batch

memory.keep()  # as `python -m educe` does
FOLDER, SETTINGS, ARRAYS = worker.given()
MESH = sharding.make_mesh()


def place(batch: Batch, group: int = 1) -> Batch:
  """As runs.py places a batch."""
  return sharding.place_batch(share(batch, group), MESH)


def load():
  model, params = safetensors.load(path=str(FOLDER))
  return model, sharding.place(params, model.axes, MESH)


def trained(case, loss, *, reference=False):
  """(model, state, step) of a run that has just begun."""
  model, params = load()
  tx = optimizer.make(
    1000,
    schedule='constant',
    learning_rate=SETTINGS['learning_rates'][case],
    **SETTINGS['optimizer'],
  )
  state = init_state(params, tx, jax.random.key(0), reference=reference)
  state = sharding.replicate_rest(state, MESH)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  return model, state, make_step(model, loss, tx, state_shardings=shardings)


def train(step, state, next_batch):
  """A run of one update on what next_batch(state) gives."""

  def run() -> float:
    nonlocal state
    state, metrics = step(state, next_batch(state))
    return float(jax.device_get(metrics)['loss'])

  return run


def prepare_sft():
  _, state, step = trained('sft', sft.loss)
  batch = Batch(ARRAYS['sft_tokens'], ARRAYS['sft_mask'])
  return train(step, state, lambda _: place(batch))


def prepare_dpo():
  loss = functools.partial(dpo.loss, beta=SETTINGS['beta'])
  model, state, step = trained('dpo', loss, reference=True)
  read = jax.jit(lambda params, batch: score(model, params, batch).logp)
  tokens, mask = ARRAYS['dpo_tokens'], ARRAYS['dpo_mask']

  def next_batch(state):  # as algorithms/dpo.py makes it
    shared = place(Batch(tokens, mask), 2)
    logp = restore(np.asarray(read(state.reference, shared)), shared, tokens.shape[1])
    return place(Batch(tokens, mask, ref_logp=logp), 2)

  return train(step, state, next_batch)


def prepare_grpo():
  _, state, step = trained('grpo', grpo.loss)
  mask = ARRAYS['grpo_mask']
  batch = Batch(
    ARRAYS['grpo_tokens'],
    mask,
    old_logp=ARRAYS['grpo_old_logp'],
    advantages=ARRAYS['grpo_advantages'][:, None] * mask,
  )
  return train(step, state, lambda _: place(batch, len(mask)))


def prepare_generate(rows: int):
  model, params = load()
  prompts = ARRAYS['prompts'][:rows].tolist()
  key = jax.random.key(0)

  def run() -> float:
    nonlocal key
    key, now = jax.random.split(key)
    drawn = sampler.sample(
      model, params, prompts, now, max_new_tokens=SETTINGS['new_tokens']
    )
    return float(drawn.length.sum())

  return run


def main():
  a = jnp.ones((worker.SIZE, worker.SIZE))
  product = jax.jit(jnp.matmul)
  worker.serve(
    {
      'sft': prepare_sft,
      'dpo': prepare_dpo,
      'grpo': prepare_grpo,
      'generate_8': lambda: prepare_generate(8),
      'generate_64': lambda: prepare_generate(64),
    },
    lambda: float(product(a, a).block_until_ready()[0, 0]),
    {'jax': jax.__version__},
  )


if __name__ == '__main__':
  main()
