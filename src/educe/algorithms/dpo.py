"""DPO and its kin: preferences, and what the reference policy thinks of them.

  batch      pairs, or labelled completions with their mismatched ones, as
             data/preference_rows.py lays them out
  ref_logp   of the reference: at every step, once for all, or not at all

The loss (losses/dpo.py) decides what is done with them. The reference is the policy that
the run starts from; with reference_every it follows the policy: TR-DPO, Alexey Gorbatovski
et al., "Learn your reference model for real good alignment", 2024, arXiv:2404.09656, whose
hard update is reference_alpha=1 and whose soft one has α of 0.5 to 0.6.
"""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from educe import hosts, sharding
from educe.algorithms import reference_logp
from educe.data import pipeline
from educe.data.pipeline import Batches
from educe.data.sharing import restore
from educe.losses.dry_run import dry_run
from educe.losses.logprobs import score
from educe.models.parts import over
from educe.progress import say
from educe.types import Algorithm, Batch, LossFn, Model, Params, TrainState

RECORDS = ('pairs', 'unpaired')


def make(
  model: Model,
  params: Params,
  data: Batches,
  loss: LossFn,
  place: Callable[..., Batch],
  *,
  reference_every: int | None = 0,
  reference_alpha: float = 1.0,
  precompute: str | None = None,
) -> Algorithm:
  """Algorithm whose step is one batch of preferences.

  Args:
    reference_every: 0 keeps the initial policy as the reference; n updates it every n
      steps; None keeps none, for a loss that needs none (ORPO, SimPO, CPO, SLiC).
    reference_alpha: α of that update: reference ← α·policy + (1 − α)·reference.
    precompute: a folder, such as 'runs/reference'. The log-probs of all pairs under the
      initial policy are computed once and stored in it; no reference is kept in memory,
      and later runs on the same pairs, tokenizer and weights read them. With it,
      reference_every stays 0.

  info: `data/ids_crc32`, and the pipeline's own counts, as for SFT.

  Raises ValueError, before the first step, for data of another kind than the loss needs,
  settings that contradict each other, and what the loss refuses.
  """
  _check(data, reference_every, reference_alpha, precompute)
  check_records(loss, data.records)
  labels = ['labels'] if data.has_labels else []
  keeps = reference_every is not None
  fields = (*labels, *(['ref_logp'] if keeps else []))
  dry_run(loss, *fields)
  if keeps and _accepts(loss, *labels):
    say(
      'warning: config.loss needs no reference, and algorithm.reference_every='
      f'{reference_every} keeps one; None saves its memory and its time'
    )
  read = jax.jit(lambda params, batch: score(model, params, batch).logp)

  def logp(params, tokens, mask) -> np.ndarray:
    """`[B, T]` of the rows given, this process's or all; 0 where the mask is."""
    batch, params = place(Batch(tokens, mask), data.group), sharding.to_device(params)
    with sharding.using_that_of(params):
      found = sharding.fetch(read(params, batch))
    if len(found) != len(tokens):
      found = found[data.mine]
    return restore(found, batch, tokens.shape[1])

  stored = None
  if precompute is not None:
    folder = pathlib.Path(precompute).expanduser()
    stored = reference_logp.load_or_compute(folder, model, params, data, logp)

  def next_batch(state: TrainState) -> tuple[Batch, dict[str, Any]]:
    with data.holding():  # a file may be out of reach for a while
      rows, info = pipeline.read(data)
      if stored is not None:
        with hosts.alone():
          rows['ref_logp'] = stored.rows(rows['ids'], rows['mask'])
      elif keeps:
        first = over(state.params, state.reference)
        rows['ref_logp'] = logp(first, rows['tokens'], rows['mask'])
    return Batch(**{name: rows[name] for name in ('tokens', 'mask', *fields)}), info

  return Algorithm(
    next_batch,
    loss,
    data,
    data.batch_size,
    reference_every=None if stored is not None else reference_every,
    reference_alpha=reference_alpha,
    asks_policy=keeps and stored is None,
    group=data.group,
    shares=data.group,
    couples=couples(loss),
    fields=fields,
  )


def check_records(loss: LossFn, records: str) -> None:
  """Raises ValueError for a variant of the loss that reads records of another kind."""
  unpaired = _named(loss, 'UNPAIRED')
  wrong = [v for v in _variants(loss) if (v in unpaired) != (records == 'unpaired')]
  if unpaired and wrong:
    needs = 'unpaired' if wrong[0] in unpaired else 'pairs'
    raise ValueError(
      f'config.loss.variant={wrong[0]!r} is of records={needs!r}, and these are '
      f'{records!r} (config.data.records; online_dpo makes pairs); change one of them'
    )


def couples(loss: LossFn) -> bool:
  """Whether its value depends on which rows lie together."""
  return not _named(loss, 'COUPLED').isdisjoint(_variants(loss))


def _named(loss: LossFn, name: str) -> set[str]:
  """The variants that a constant of the loss's file names."""
  module = inspect.getmodule(getattr(loss, 'func', loss))
  return set(getattr(module, name, ()))


def _variants(loss: LossFn) -> Iterable[str]:
  """What the loss's `variant` names, of a mixture those with weight."""
  parameter = inspect.signature(loss).parameters.get('variant')
  variant = None if parameter is None else parameter.default
  if isinstance(variant, Mapping):
    return [name for name, weight in variant.items() if weight]
  return [] if variant is None else [variant]


def _accepts(loss: LossFn, *fields: str) -> bool:
  try:
    dry_run(loss, *fields)
  except Exception:  # of a loss of one's own, any
    return False
  return True


def _check(data: Batches, reference_every, reference_alpha, precompute) -> None:
  if data.records not in RECORDS:
    raise ValueError(
      f'config.data.records={data.records!r}: dpo reads {" or ".join(RECORDS)}; set '
      "config.data.records='pairs'"
    )
  if (reference_every or 0) < 0 or not 0 < reference_alpha <= 1:
    raise ValueError(
      f'algorithm: {reference_every=} must be ≥ 0 and {reference_alpha=} in (0, 1]'
    )
  if reference_alpha < 1 and not reference_every:
    raise ValueError(
      f'algorithm: {reference_alpha=} is of a reference that moves, and {reference_every=} '
      'moves none; 512 is usual'
    )
  if precompute is None:
    return
  if reference_every != 0:
    raise ValueError(
      f'algorithm: {precompute=} is of the initial policy; it needs reference_every=0, not '
      f'{reference_every}'
    )
  if data.records == 'unpaired':
    raise ValueError(
      f'algorithm: {precompute=}: the mismatched completions of unpaired records are '
      'others in each epoch; leave it out'
    )
