"""DPO and its kin: a policy straight from preferences, without a reward model.

  L = ⟨ ω · Σ_v weight_v · L_v ⟩        over pairs, or over labelled completions (nats)

L_v is the loss of variant v, in losses/dpo_variants.py, which has the equations and their
sources; a mixture weighs several. Of a pair (w chosen, l rejected) they see
h = Σ_t log π(y_t)/π_ref(y_t), or the log-probs alone, after these settings:

  f_divergence       φ(h) in place of h: a reward model under another divergence than the
                     KL; losses/f_divergence.py, arXiv:2309.16240
  length_normalised  h/|y|: what the authors of IPO advise, and sigmoid_norm always does
  ld_alpha           tokens past the length of the shorter completion of the pair count
                     ld_alpha times, in h and in log-probs. Wei Liu et al. (LD-DPO), 2024,
                     arXiv:2409.06411
  margin_coef        o = margin_coef·(label_w − label_l) is the margin asked of a pair.
                     Afra Amini et al. (ODPO), 2024, arXiv:2402.10571
  use_weighting      ω = sg(ω_w·ω_l), ω_y = exp((1/|y|)·Σ_t (log π(y_t) + H_t)), and 1 for
                     sft. Wenxuan Zhou et al. (WPO), 2024, eq. 2, arXiv:2406.11827

A mixture is {variant: weight}: MPO is {'sigmoid': 0.8, 'bco_pair': 0.2, 'sft': 1.0}
(Weiyun Wang et al., 2024, arXiv:2411.10442), RPO {'sigmoid': 1.0, 'sft': 1.0} (Richard
Yuanzhe Pang et al., 2024, arXiv:2404.19733).

KTO's baseline is z₀ = sg(max(0, mean of h over mismatched rows)): completions of other
prompts, which estimate the KL of the policy to the reference. Without such rows it is 0.

Differs from the papers: WPO divides π(y_t) by Σ_v π(v)², the mean of π(v) when v ~ π;
here by e^{−H_t}, its geometric mean, which the scores already hold: text that the policy
drew itself still weighs about 1. ODPO takes the logarithm of the label difference. What
else differs is said where the equations are.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax.lax import stop_gradient as sg

from educe.losses import aggregate as agg
from educe.losses import dpo_variants
from educe.losses import f_divergence as divergences
from educe.losses.dpo_variants import PAIRED, REFERENCE, REFERENCE_FREE, UNPAIRED
from educe.spelling import near
from educe.types import Batch, Max, Mean, Scores

VARIANTS = (*PAIRED, *UNPAIRED)

# Their value depends on which rows lie together: a batch of them must not be cut.
COUPLED = frozenset({'aot', 'aot_unpaired', 'bco_pair', 'kto'})

_ON_SUMS = {*REFERENCE} - {'sigmoid_norm', 'aot', 'aot_unpaired'}

# Which variants read a setting; any other is refused it, rather than left as it was.
READS: dict[str, set[str]] = {
  'beta': {*VARIANTS} - {'slic', 'sft'},
  'label_smoothing': {
    *('sigmoid', 'sigmoid_norm', 'robust', 'exo_pair', 'aot', 'aot_unpaired'),
    *('simpo', 'cpo'),
  },
  'f_divergence': {'sigmoid', 'hinge', 'robust', 'exo_pair', 'discopop'},
  'f_alpha': {'sigmoid', 'hinge', 'robust', 'exo_pair', 'discopop'},
  'length_normalised': _ON_SUMS,
  'ld_alpha': _ON_SUMS | {'cpo', 'slic'},
  'margin_coef': {'sigmoid', 'sigmoid_norm', 'hinge'},
  'use_weighting': {*PAIRED} - {'aot', 'aot_unpaired', 'sft'},
  'gamma': {'simpo', 'slic'},
  'nll_coef': {'cpo', 'slic'},
  'discopop_tau': {'discopop'},
  'desirable_weight': {*UNPAIRED},
  'undesirable_weight': {*UNPAIRED},
}


def loss(
  scores: Scores,
  batch: Batch,
  *,
  variant: str | Mapping[str, float] = 'sigmoid',
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  f_divergence: str = 'reverse_kl',
  f_alpha: float = 0.5,
  length_normalised: bool = False,
  ld_alpha: float = 1.0,
  margin_coef: float = 0.0,
  use_weighting: bool = False,
  gamma: float = 0.0,
  nll_coef: float = 1.0,
  discopop_tau: float = 0.05,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
) -> tuple[Mean, dict[str, Mean | Max]]:
  """The loss at the top of this file, and its metrics. One sequence a row.

  Pairs: rows 2i (chosen) and 2i+1 (rejected) answer prompt i. Single completions: row 2i
  answers prompt i, with label 1 (desirable) or 0 (not); row 2i+1 holds prompt i and the
  completion of another row, with label NaN, and serves z₀ alone. A pair, or row, without
  a trained token is in neither sum nor count.

  Reads batch.ref_logp, where the variant has a reference; batch.labels, of single
  completions and with margin_coef. What stands where the mask is 0, NaN and ±inf
  included, touches neither value nor gradient.

  Args:
    variant: a name in VARIANTS, or {name: weight}
    beta: β; ipo aims at a margin of 1/(2β) nats, sppo_hard at rewards of ±1/(2β); of orpo
      the weight λ. SimPO was run with 2.5 (and gamma=1.375), Tülu 3's sigmoid_norm with 5
    label_smoothing: ε in [0, 0.5), the share of labels taken to be wrong
    f_divergence: 'reverse_kl', 'forward_kl', 'js' or 'alpha', with f_alpha in (0, 1)
    ld_alpha: in [0, 1]; 1 is no change, 0 drops the tail
    gamma: the margin of simpo, and of slic in nats
    nll_coef: weight of the chosen NLL in cpo and slic
    discopop_tau: τ in (0, 1)
    desirable_weight, undesirable_weight: λ₊ and λ₋

  metrics, over pairs:
    rewards/{chosen,rejected,margins}: what the first variant that is not sft scores:
      β·h of a reference (after the settings above), else β times log-probs or their mean
    rewards/accuracies: share of pairs whose chosen one has the higher reward
    logps/{chosen,rejected}: log π of completions (nats per sequence)
    nll_loss: of sft, orpo, cpo, slic (nats per token of the chosen ones)
    log_odds_chosen: Δ log odds, of orpo · weighting: ω, of use_weighting
    loss/<variant>: before its weight, of a mixture
  over completions: rewards and logps of {chosen,rejected}, the desirable and undesirable
  ones; kl: z₀, of kto (nats per sequence)
  over tokens: entropy (nats)

  Raises ValueError for a bad setting, one that the variant does not read, or one that
  the batch has no arrays for.
  """
  settings = {k: v for k, v in locals().items() if k not in ('scores', 'batch')}
  weights = _check(batch, settings)
  mask = batch.mask
  clean = functools.partial(agg.clean, mask=mask)
  logp, entropy = clean(scores.logp), clean(scores.entropy)
  ref_logp = None if batch.ref_logp is None else sg(clean(batch.ref_logp))
  metrics: dict[str, Mean | Max] = {'entropy': agg.token_mean(entropy, mask)}
  if set(weights) & set(UNPAIRED):
    assert ref_logp is not None
    total, more = _of_completions(logp - ref_logp, logp, batch, weights, settings)
  else:
    total, more = _of_pairs(logp, ref_logp, entropy, batch, weights, settings)
  return total, metrics | more


def _of_pairs(logp, ref_logp, entropy, batch, weights, settings):
  lengths = batch.mask.sum(-1)
  there = lengths.reshape(-1, 2).min(-1) > 0
  mean = functools.partial(agg.over, counted=there)
  knobs = dpo_variants.Knobs(**{k: settings[k] for k in dpo_variants.Knobs._fields})
  seen = {
    name: _pairs(name, logp, ref_logp, batch, lengths, there, settings)
    for name in weights
  }
  losses = {name: PAIRED[name](pairs, knobs) for name, pairs in seen.items()}
  metrics = {}
  if settings['use_weighting']:
    per_token = (logp + entropy).sum(-1) / jnp.maximum(lengths, 1)
    weighting = sg(jnp.exp(per_token.reshape(-1, 2).sum(-1)))
    metrics['weighting'] = mean(weighting)
    for name in set(losses) & READS['use_weighting']:
      losses[name] = losses[name] * weighting
  if len(losses) > 1:
    metrics |= {f'loss/{name}': mean(x) for name, x in losses.items()}
  scored = next((name for name in weights if name != 'sft'), None)
  if scored:
    r_w, r_l = dpo_variants.rewards(scored, seen[scored], settings['beta'])
    metrics |= {
      'rewards/chosen': mean(r_w),
      'rewards/rejected': mean(r_l),
      'rewards/margins': mean(r_w - r_l),
      'rewards/accuracies': mean((r_w > r_l) * 1.0),
    }
  chosen, rejected = _split(logp.sum(-1))
  metrics |= {'logps/chosen': mean(chosen), 'logps/rejected': mean(rejected)}
  if set(weights) & {'sft', 'orpo', 'cpo', 'slic'}:
    metrics['nll_loss'] = mean(-next(iter(seen.values())).mean_w)
  if 'orpo' in weights:
    pairs = seen['orpo']
    metrics['log_odds_chosen'] = mean(
      dpo_variants.log_odds(pairs.mean_w) - dpo_variants.log_odds(pairs.mean_l)
    )
  return mean(sum(weights[name] * x for name, x in losses.items())), metrics


def _pairs(name, logp, ref_logp, batch, lengths, there, settings):
  """The pairs as one variant reads them: a setting that it does not read is not made."""
  reads = {k for k, names in READS.items() if name in names}
  share = jnp.ones_like(batch.mask)
  if 'ld_alpha' in reads and settings['ld_alpha'] != 1:
    shorter = jnp.repeat(lengths.reshape(-1, 2).min(-1), 2)[:, None]
    past = jnp.cumsum(batch.mask, -1) > shorter
    share = jnp.where(past, settings['ld_alpha'], 1.0)
  per_token = jnp.maximum(lengths, 1)
  logp_w, logp_l = _split((logp * share).sum(-1))
  mean_w, mean_l = _split(logp.sum(-1) / per_token)
  offset = jnp.zeros_like(logp_w)
  if 'margin_coef' in reads and settings['margin_coef']:
    label_w, label_l = _split(batch.labels)
    offset = settings['margin_coef'] * (label_w - label_l)
  pairs = dpo_variants.Pairs(there, logp_w, logp_l, mean_w, mean_l, offset)
  if name in REFERENCE_FREE:
    return pairs
  # Differences before sums, so that a policy that is its reference has an h of exactly 0.
  h = ((logp - ref_logp) * share).sum(-1)
  if name == 'sigmoid_norm' or (
    'length_normalised' in reads and settings['length_normalised']
  ):
    h = h / per_token
  if 'f_divergence' in reads:
    h = divergences.implicit_reward(h, settings['f_divergence'], settings['f_alpha'])
  h_w, h_l = _split(h)
  ref_w, ref_l = _split(ref_logp.sum(-1))
  return pairs._replace(h_w=h_w, h_l=h_l, ref_margin=ref_w - ref_l)


def _of_completions(log_ratio, logp, batch, weights, settings):
  h, there, beta = log_ratio.sum(-1), batch.mask.sum(-1) > 0, settings['beta']
  # A label of NaN is neither: comparisons with it are false.
  desirable, undesirable = there & (batch.labels > 0), there & (batch.labels <= 0)
  labelled = desirable | undesirable
  row_weight = jnp.where(
    desirable, settings['desirable_weight'], settings['undesirable_weight']
  )
  metrics, losses = {}, {}
  for name in weights:
    z0 = jnp.zeros_like(h[0])
    if name == 'kto':
      kl = agg.over(h, there & jnp.isnan(batch.labels))
      z0 = sg(jnp.maximum(kl.total / jnp.maximum(kl.count, 1), 0))
      metrics['kl'] = Mean(z0, jnp.ones_like(z0))
    losses[name] = row_weight * dpo_variants.kto(h, z0, desirable, beta)
  if len(losses) > 1:
    metrics |= {f'loss/{name}': agg.over(x, labelled) for name, x in losses.items()}
  for key, rows in (('chosen', desirable), ('rejected', undesirable)):
    metrics[f'rewards/{key}'] = agg.over(beta * h, rows)
    metrics[f'logps/{key}'] = agg.over(logp.sum(-1), rows)
  total = sum(weights[name] * x for name, x in losses.items())
  return agg.over(total, labelled), metrics


def _split(x):
  """(chosen, rejected), `[P]` each. By a reshape, which leaves a pair on its device."""
  pairs = x.reshape(-1, 2)
  return pairs[:, 0], pairs[:, 1]


def _check(batch: Batch, settings) -> dict[str, float]:
  """{variant: weight}, or one clear line for what cannot be."""
  variant, s = settings['variant'], settings
  weights = dict(variant) if isinstance(variant, Mapping) else {variant: 1.0}
  for name, weight in weights.items():
    if name not in VARIANTS:
      raise ValueError(f'dpo: no variant {name!r}' + near(str(name), VARIANTS))
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
      raise ValueError(f'dpo: variant has {name!r}: {weight}; a weight is positive')
  known = inspect.signature(loss).parameters
  for knob, names in READS.items():
    if s[knob] != known[knob].default and not names & set(weights):
      raise ValueError(
        f'dpo: {knob}={s[knob]!r} is not read by variant={variant!r}; leave it out, or '
        f'choose one of {sorted(names)}'
      )
  divergences.check(s['f_divergence'], s['f_alpha'])
  rows, referenced = len(batch.tokens), set(weights) - set(REFERENCE_FREE)
  wrong = None
  if not weights:
    wrong = 'variant={} is a mixture of nothing'
  elif set(weights) & set(UNPAIRED) and set(weights) & set(PAIRED):
    wrong = f'variant={variant!r} mixes pairs with single completions'
  elif not 0 < s['beta'] < math.inf:
    wrong = f'beta={s["beta"]} must be positive'
  elif not 0 <= s['label_smoothing'] < 0.5:
    wrong = f'label_smoothing={s["label_smoothing"]} must be in [0, 0.5)'
  elif 'exo_pair' in weights and not s['label_smoothing']:
    wrong = "variant='exo_pair' is infinite at label_smoothing=0; 1e-3 is usual"
  elif s['f_alpha'] != known['f_alpha'].default and s['f_divergence'] != 'alpha':
    wrong = f"f_alpha={s['f_alpha']} belongs to f_divergence='alpha'"
  elif not 0 <= s['ld_alpha'] <= 1:
    wrong = f'ld_alpha={s["ld_alpha"]} must be in [0, 1]'
  elif s['length_normalised'] and s['ld_alpha'] != 1:
    wrong = 'length_normalised and ld_alpha both correct for length; choose one'
  elif s['length_normalised'] and s['f_divergence'] != 'reverse_kl':
    wrong = (
      f'f_divergence={s["f_divergence"]!r} is of the whole completion; leave '
      'length_normalised out'
    )
  elif not 0 <= s['gamma'] < math.inf:
    wrong = f'gamma={s["gamma"]} must not be negative'
  elif 'slic' in weights and not s['gamma']:
    wrong = "variant='slic' has no margin at gamma=0; give one in nats, such as 1.0"
  elif not 0 <= s['nll_coef'] < math.inf:
    wrong = f'nll_coef={s["nll_coef"]} must not be negative'
  elif not 0 < s['discopop_tau'] < 1:
    wrong = f'discopop_tau={s["discopop_tau"]} must be in (0, 1)'
  elif not (
    0 <= s['desirable_weight'] < math.inf and 0 <= s['undesirable_weight'] < math.inf
  ):
    wrong = (
      f'desirable_weight={s["desirable_weight"]} and undesirable_weight='
      f'{s["undesirable_weight"]} must not be negative'
    )
  elif not 0 <= s['margin_coef'] < math.inf:
    wrong = f'margin_coef={s["margin_coef"]} must not be negative'
  elif referenced and batch.ref_logp is None:
    wrong = (
      f'variant={variant!r} needs log-probs of a reference (batch.ref_logp): set '
      'config.algorithm.reference_every=0 (the initial policy), or choose one of '
      f'{list(REFERENCE_FREE)}'
    )
  elif batch.labels is None and (s['margin_coef'] or set(weights) & set(UNPAIRED)):
    what = f'margin_coef={s["margin_coef"]}' if s['margin_coef'] else f'{variant=}'
    wrong = f'{what} needs batch.labels, which are None; the data have no labels'
  elif batch.segments is not None:
    wrong = 'batch.segments is set: one sequence a row, with packing=False'
  elif rows % 2:
    wrong = f'{rows} rows are not pairs: rows 2i and 2i+1 belong together'
  if wrong:
    raise ValueError(f'dpo: {wrong}')
  return weights
