"""The pair losses by themselves: slopes at the reference, ranks, odds.

Their values and gradients on batches are in test_dpo.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe.losses import dpo_variants
from educe.losses.dpo_variants import PAIRED, REFERENCE, Knobs, Pairs

BETA, E, TAU = 0.3, 0.1, 0.05
KNOBS = Knobs(BETA, E, gamma=0.5, nll_coef=0.7, discopop_tau=TAU)


def pairs(h_w, h_l, **more):
  h_w, h_l = jnp.asarray(h_w, jnp.float64), jnp.asarray(h_l, jnp.float64)
  zero = jnp.zeros_like(h_w)
  made = Pairs(zero == 0, h_w, h_l, h_w, h_l, zero, h_w, h_l, zero)
  return made._replace(**more)


# d/dh_w and d/dh_l at h_w = h_l = 0, by hand. S_ε'(0) = −(1 − 2ε)/2, σ'(0) = 1/4.
SMOOTHED = (-BETA * (1 - 2 * E) / 2, BETA * (1 - 2 * E) / 2)
# q·log(q/(1−ε)) + (1−q)·log((1−q)/ε) has slope q' · log(ε/(1−ε)) at q = 1/2.
EXO = BETA / 4 * np.log(E / (1 - E))
# (1−m)·S_0 + m·e^{−z}, m' = 1/(4τ): it rises at the reference, as in the paper's figure.
DISCO = BETA * ((1 - np.log(2)) / (4 * TAU) - 1 / 4 - 1 / 2)
SLOPES = {
  'sigmoid': SMOOTHED,
  'sigmoid_norm': SMOOTHED,
  'aot': SMOOTHED,
  'aot_unpaired': SMOOTHED,
  'hinge': (-BETA, BETA),
  # Steeper by 1/(1 − 2ε), so that with a share ε of flipped pairs the mean is sigmoid's.
  'robust': (-BETA / 2 / (1 - 2 * E), BETA / 2 / (1 - 2 * E)),
  'exo_pair': (EXO, -EXO),
  'discopop': (DISCO, -DISCO),
  'ipo': (-1 / BETA, 1 / BETA),
  'sppo_hard': (-1 / BETA, 1 / BETA),
  'nca_pair': (-BETA / 4, BETA / 4),
  'bco_pair': (-BETA / 2, BETA / 2),
  'apo_zero': (-BETA / 4, BETA / 4),
  'apo_down': (0.0, BETA / 4),
}


@pytest.mark.parametrize('variant', REFERENCE)
def test_the_slope_at_the_reference_is_the_one_derived_by_hand(variant):
  with jax.enable_x64():
    value = lambda w, l: PAIRED[variant](pairs(w, l), KNOBS).sum()  # noqa: E731, E741
    got = jax.grad(value, argnums=(0, 1))(jnp.zeros(3), jnp.zeros(3))
  for slope, want in zip(got, SLOPES[variant], strict=True):
    np.testing.assert_allclose(slope, want, rtol=1e-12, atol=1e-15)


def test_nca_and_apo_down_lower_a_chosen_one_that_has_risen_enough():
  """Absolute rewards: the margin alone does not say what these do."""
  with jax.enable_x64():
    for variant, turn in (('nca_pair', np.log(2) / BETA), ('apo_down', 0.0)):
      objective = PAIRED[variant]
      value = lambda h, f=objective: f(pairs(h, h - 1e-9), KNOBS).sum()  # noqa: E731
      slope = jax.jacobian(
        lambda w, f=objective: f(pairs(w, jnp.full(2, -40.0)), KNOBS).sum()
      )(jnp.array([turn - 1.0, turn + 1.0]))
      assert np.isfinite(value(jnp.zeros(1)))
      assert slope[1] > 0
      assert (slope[0] < 0) == (variant == 'nca_pair')


def test_each_pair_meets_the_reference_margin_of_its_own_rank():
  with jax.enable_x64():
    u = jnp.array([3.0, -1.0, 99.0, 2.0])
    v = jnp.array([10.0, 30.0, -99.0, 20.0])
    there = jnp.array([True, True, False, True])  # pair 2 has no text
    plain = KNOBS._replace(label_smoothing=0.0)
    p = pairs(u, jnp.zeros(4), ref_margin=v, there=there)
    got = dpo_variants.aot(p, plain)
    p = pairs(u, v, there=there)
    unpaired = dpo_variants.aot_unpaired(p, plain)
  want = np.log1p(np.exp(-BETA * (np.array([3.0, -1.0, 2.0]) - [30.0, 10.0, 20.0])))
  np.testing.assert_allclose(got[there], want, rtol=1e-12)
  np.testing.assert_allclose(unpaired[there], want, rtol=1e-12)


def test_a_pair_without_text_does_not_shift_bco():
  with jax.enable_x64():
    there = jnp.array([True, True, False])
    p = pairs([1.0, 2.0, 50.0], [0.5, -1.0, 50.0], there=there)
    got = dpo_variants.bco_pair(p, KNOBS)[:2]
    cut = pairs([1.0, 2.0], [0.5, -1.0])
    np.testing.assert_allclose(got, dpo_variants.bco_pair(cut, KNOBS), rtol=1e-12)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_log_odds_keep_their_digits_at_both_ends(dtype):
  x = np.array([-1e-5, -1e-3, -0.5, -30.0, -500.0])
  with jax.enable_x64(dtype == jnp.float64):
    got = np.asarray(dpo_variants.log_odds(jnp.asarray(x, dtype)))
  x = np.asarray(x.astype(dtype), np.float64)
  want = x - np.log(-np.expm1(x))
  np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == jnp.float32 else 1e-13)
  assert np.isfinite(dpo_variants.log_odds(jnp.zeros(1))).all()
  assert np.isfinite(jax.grad(lambda y: dpo_variants.log_odds(y).sum())(jnp.zeros(1)))


def test_rewards_are_in_the_unit_of_each_margin():
  with jax.enable_x64():
    p = pairs([2.0], [1.0], mean_w=jnp.array([0.4]), logp_w=jnp.array([5.0]))
    for variant, want in (
      *((name, BETA * 2.0) for name in REFERENCE),
      *(
        ('orpo', BETA * 0.4),
        ('simpo', BETA * 0.4),
        ('cpo', BETA * 5.0),
        ('slic', 5.0),
      ),
    ):
      assert dpo_variants.rewards(variant, p, BETA)[0] == want, variant
