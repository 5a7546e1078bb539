"""What a pair costs, by every name the field uses: the equations of losses/dpo.py.

Of a pair (w chosen, l rejected), with |y| the trained tokens of y (Σ_t and means over
those), σ the logistic function and ε the label smoothing,

  ℓ = Σ_t log π(y_t)                ℓ̄ = ℓ/|y|             Δx = x_w − x_l
  h = Σ_t log π(y_t)/π_ref(y_t)     NLL = −ℓ̄_w            o = margin_coef·Δlabel
  S_ε(z) = −(1 − ε)·log σ(z) − ε·log σ(−z)                δ = sg(mean β·(h_w + h_l)/2)

with a reference
  sigmoid       S_ε(βΔh − o)
  sigmoid_norm  S_ε(βΔ(h/|y|) − o)
  hinge         max(0, 1 + o − βΔh)
  robust        ((1 − ε)·S_0(βΔh) − ε·S_0(−βΔh)) / (1 − 2ε)
  exo_pair      KL((q, 1 − q) ‖ (1 − ε, ε)), q = σ(βΔh)
  discopop      (1 − m)·S_0(βΔh) + m·e^{−βΔh}, m = σ(βΔh/τ)
  ipo           (Δh − 1/(2β))²
  sppo_hard     (h_w − 1/(2β))² + (h_l + 1/(2β))²
  nca_pair      S_0(βh_w) + ½·S_0(−βh_w) + ½·S_0(−βh_l)
  bco_pair      S_0(βh_w − δ) + S_0(δ − βh_l)
  apo_zero      1 − σ(βh_w) + σ(βh_l)
  apo_down      σ(βh_w) + 1 − σ(βΔh)
  aot           S_ε(β(u − v)): u = Δℓ of this pair, v = Δℓ_ref of the same rank
  aot_unpaired  S_ε(β(u − v)): u = h_w of this pair, v = the h_l of the same rank
without one
  orpo          NLL + β·S_0(Δ log(p/(1 − p))), p = e^ℓ̄
  simpo         S_ε(βΔℓ̄ − γ)
  cpo           S_ε(βΔℓ) + nll_coef·NLL
  slic          max(0, γ − Δℓ) + nll_coef·NLL
  sft           NLL

and of a single completion, desirable (+) or not (−), with z₀ ≥ 0 the KL baseline,

  kto                + λ₊·σ(−β(h − z₀))      − λ₋·σ(β(h − z₀))
  apo_zero_unpaired  + λ₊·σ(−βh)             − λ₋·σ(βh)

Sources: sigmoid: Rafael Rafailov et al., 2023, eq. 7, arXiv:2305.18290; ε: Eric Mitchell,
"A note on DPO with noisy preferences", 2023; o: Afra Amini et al. (ODPO), 2024,
arXiv:2402.10571. sigmoid_norm: Nathan Lambert et al. (Tülu 3), 2024, arXiv:2411.15124.
hinge: Tianqi Liu et al. (RSO), 2023, arXiv:2309.06657. robust: Sayak Ray Chowdhury et
al., 2024, arXiv:2403.00409. exo_pair: Haozhe Ji et al., 2024, arXiv:2402.00856. discopop:
Chris Lu et al., 2024, arXiv:2406.08414. ipo: Mohammad Gheshlaghi Azar et al., 2023, eq.
17, arXiv:2310.12036. sppo_hard: Yue Wu et al., 2024, arXiv:2405.00675. nca_pair: Huayu
Chen et al., 2024, arXiv:2402.05369. bco_pair: Seungjae Jung et al., 2024,
arXiv:2404.04656. apo: Karel D'Oosterlinck et al., 2024, arXiv:2408.06266. aot: Igor
Melnyk et al., 2024, arXiv:2406.05882. orpo: Jiwoo Hong et al., 2024, arXiv:2403.07691.
simpo: Yu Meng et al., 2024, arXiv:2405.14734. cpo: Haoran Xu et al., 2024,
arXiv:2401.08417. slic: Yao Zhao et al. (SLiC-HF), 2023, arXiv:2305.10425. kto: Kawin
Ethayarajh et al., 2024, arXiv:2402.01306.

Differs from the papers: NLL is a mean over the tokens of each chosen completion, where
CPO and SLiC print a sum. BCO's δ is a mean over the batch, not a moving average over
steps. SPPO's win probability is 1 or 0. APO is shifted so as never to be negative. In
ORPO ℓ̄ is at most −1e-6, for the odds of a certainty are infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Bool, Float

CERTAIN = -1e-6  # nats a token; 1 − e^x of anything closer to 0 has few digits left


class Pairs(NamedTuple):
  """What a variant reads of P pairs, each `[P]`; sums, means over trained tokens."""

  there: Bool[Array, 'P']  # both completions have a trained token
  logp_w: Float[Array, 'P']  # ℓ (nats)
  logp_l: Float[Array, 'P']
  mean_w: Float[Array, 'P']  # ℓ̄ (nats per token)
  mean_l: Float[Array, 'P']
  offset: Float[Array, 'P']  # o
  # None without a reference. By the settings h is h/|y| or φ(h) (f_divergence.py).
  h_w: Float[Array, 'P'] | None = None
  h_l: Float[Array, 'P'] | None = None
  ref_margin: Float[Array, 'P'] | None = None  # Δℓ under the reference


class Knobs(NamedTuple):
  """The numbers in the equations."""

  beta: float
  label_smoothing: float
  gamma: float
  nll_coef: float
  discopop_tau: float


def logistic(z: Float[Array, '*shape'], label_smoothing: float = 0.0):
  """S_ε(z), the cross-entropy of σ(z) with a label that is right with 1 − ε."""
  if not label_smoothing:
    return -jax.nn.log_sigmoid(z)
  right, wrong = jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
  return -(1 - label_smoothing) * right - label_smoothing * wrong


def sigmoid(p, k):
  return logistic(k.beta * (p.h_w - p.h_l) - p.offset, k.label_smoothing)


def hinge(p, k):
  return jax.nn.relu(1 + p.offset - k.beta * (p.h_w - p.h_l))


def robust(p, k):
  z, e = k.beta * (p.h_w - p.h_l), k.label_smoothing
  return ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)


def exo_pair(p, k):
  z, e = k.beta * (p.h_w - p.h_l), k.label_smoothing
  chosen = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-e))
  return chosen + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(e))


def discopop(p, k):
  z = k.beta * (p.h_w - p.h_l)
  # m·e^{−z} as one exponential: apart, they are 0 · ∞ for a pair that is very wrong.
  exponential = jnp.exp(jax.nn.log_sigmoid(z / k.discopop_tau) - z)
  return jax.nn.sigmoid(-z / k.discopop_tau) * logistic(z) + exponential


def ipo(p, k):
  return (p.h_w - p.h_l - 1 / (2 * k.beta)) ** 2


def sppo_hard(p, k):
  return (p.h_w - 1 / (2 * k.beta)) ** 2 + (p.h_l + 1 / (2 * k.beta)) ** 2


def nca_pair(p, k):
  r_w, r_l = k.beta * p.h_w, k.beta * p.h_l
  return logistic(r_w) + logistic(-r_w) / 2 + logistic(-r_l) / 2


def bco_pair(p, k):
  r_w, r_l = k.beta * p.h_w, k.beta * p.h_l
  pairs = jnp.maximum(p.there.sum(), 1)
  delta = sg(jnp.where(p.there, r_w + r_l, 0.0).sum() / (2 * pairs))
  return logistic(r_w - delta) + logistic(delta - r_l)


def apo_zero(p, k):
  return jax.nn.sigmoid(-k.beta * p.h_w) + jax.nn.sigmoid(k.beta * p.h_l)


def apo_down(p, k):
  down = jax.nn.sigmoid(k.beta * p.h_w)
  return down + jax.nn.sigmoid(-k.beta * (p.h_w - p.h_l))


def aot(p, k):
  u, v = p.logp_w - p.logp_l, p.ref_margin
  return logistic(k.beta * (u - _of_same_rank(u, v, p.there)), k.label_smoothing)


def aot_unpaired(p, k):
  u, v = p.h_w, p.h_l
  return logistic(k.beta * (u - _of_same_rank(u, v, p.there)), k.label_smoothing)


def orpo(p, k):
  return -p.mean_w + k.beta * logistic(log_odds(p.mean_w) - log_odds(p.mean_l))


def simpo(p, k):
  return logistic(k.beta * (p.mean_w - p.mean_l) - k.gamma, k.label_smoothing)


def cpo(p, k):
  z = k.beta * (p.logp_w - p.logp_l)
  return logistic(z, k.label_smoothing) - k.nll_coef * p.mean_w


def slic(p, k):
  return jax.nn.relu(k.gamma - (p.logp_w - p.logp_l)) - k.nll_coef * p.mean_w


def sft(p, k):
  return -p.mean_w


def kto(h, z0, desirable, beta):
  """σ(∓β(h − z₀)), `[P]`, of completions; desirable: Bool `[P]`."""
  z = beta * (h - z0)
  return jax.nn.sigmoid(jnp.where(desirable, -z, z))


def log_odds(mean_logp: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """log(p/(1 − p)) of p = e^ℓ̄, without forming p."""
  x = jnp.minimum(mean_logp, CERTAIN)
  return x - jnp.log(-jnp.expm1(x))


Objective = Callable[[Pairs, Knobs], Float[Array, 'P']]


def _named(*objectives: Objective) -> dict[str, Objective]:
  return {objective.__name__: objective for objective in objectives}


REFERENCE = _named(
  *(sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard),
  *(aot, aot_unpaired, apo_zero, apo_down, discopop),
) | {'sigmoid_norm': sigmoid}
REFERENCE_FREE = _named(orpo, simpo, cpo, slic, sft)
PAIRED = REFERENCE | REFERENCE_FREE
UNPAIRED = ('kto', 'apo_zero_unpaired')


def rewards(
  variant: str, p: Pairs, beta: float
) -> tuple[Float[Array, 'P'], Float[Array, 'P']]:
  """(chosen, rejected) as a variant scores them, in the unit of its own margin."""
  if variant in REFERENCE:
    assert p.h_w is not None
    assert p.h_l is not None
    return beta * p.h_w, beta * p.h_l
  if variant in ('orpo', 'simpo'):
    return beta * p.mean_w, beta * p.mean_l
  scale = beta if variant == 'cpo' else 1.0
  return scale * p.logp_w, scale * p.logp_l


def _of_same_rank(u, v, there):
  """For each u, the v that has the same rank among all v. Pairs not there come last."""
  last = lambda x: jnp.argsort(jnp.where(there, sg(x), jnp.inf))  # noqa: E731
  rank = jnp.argsort(last(u))
  return v[last(v)][rank]
