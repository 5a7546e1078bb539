"""Attention against a loop over its queries, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from educe.models import attention


def test_attention_equals_a_loop():
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=s) for s in [(2, 5, 6, 8), (2, 3, 7, 8), (2, 3, 7, 8)])
  visible = rng.random((2, 5, 7)) < 0.6
  visible[0, 2] = False
  want = np.zeros_like(q)
  for b, t, n in np.ndindex(2, 5, 6):
    see = visible[b, t]
    if see.any():
      score = np.exp(k[b, n // 2, see] @ q[b, t, n])
      want[b, t, n] = score @ v[b, n // 2, see] / score.sum()
  got = attention.attend(
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(visible)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('heads', [3, 6])
def test_a_fork_equals_whole_rows(heads):
  """Each completion beside its own copy of the prompt, one after the other."""
  rng = np.random.default_rng(1)
  B, S, G, T, K, h = 2, 5, 3, 4, 3, 8
  N = S + G * T
  q = jnp.float32(rng.normal(size=(B, N, heads, h)))
  k, v = (jnp.float32(rng.normal(size=(B, K, N, h))) for _ in range(2))
  prompt = jnp.asarray([[True] * S, [True] * 3 + [False] * 2])
  causal = jnp.tril(jnp.ones((T, T), bool))[None]
  got = attention.attend_forked(q, k, v, attention.Fork(prompt, causal))
  for g in range(G):
    own = np.r_[:S, S + g * T : S + (g + 1) * T]
    visible = np.tril(np.ones((S + T, S + T), bool))[None].repeat(B, 0)
    visible[:, :, :S] &= np.asarray(prompt)[:, None]
    want = attention.attend(q[:, own], k[:, :, own], v[:, :, own], jnp.asarray(visible))
    np.testing.assert_allclose(got[:, own], want, atol=2e-6)
