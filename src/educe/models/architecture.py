"""A decoder, described: sizes, options, and what they may be."""

from __future__ import annotations

import dataclasses
import math

import jax

from educe.kernels import logprob
from educe.models import attention

DTYPES = ('float32', 'bfloat16', 'float16')
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
CHOICES = {
  'param_dtype': DTYPES,
  'compute_dtype': DTYPES,
  'remat': tuple(REMAT),
  'logprob': ('auto', *logprob.IMPLEMENTATIONS),
  'attention': attention.IMPLEMENTATIONS,
  'qk_norm': ('none', 'head', 'whole'),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A decoder, described by plain values that go through JSON unchanged."""

  vocab_size: int
  dim: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  max_length: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied: bool = False
  param_dtype: str = 'float32'
  compute_dtype: str = 'float32'
  remat: str = 'none'  # none | full (recompute all) | dots (keep matmul outputs)
  logprob: str = 'auto'  # or an implementation of kernels/logprob, by name
  attention: str = 'auto'  # auto | portable | cudnn | splash; decode steps: portable
  qk_norm: str = 'none'  # none | head (each head's h, Qwen3) | whole (all heads, OLMoE)
  experts: int = 0  # 0: one MLP, dense; else `ffn` is an expert's width
  experts_per_token: int = 0
  renormalise: bool = False  # the weights of a token's experts sum to 1
  balance_coef: float = 0.0  # of the auxiliary losses in the objective (moe.py)
  router_z_coef: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == 'int' and value < (not field.name.startswith('experts')):
        raise ValueError(f'architecture.{field.name} = {value} must be positive')
      if field.name.endswith('_coef') and not 0 <= value < math.inf:
        raise ValueError(f'{field.name} = {value} must be at least 0, and finite')
    if self.heads % self.kv_heads:
      raise ValueError(
        f'architecture.heads = {self.heads} must be a multiple of '
        f'kv_heads = {self.kv_heads}'
      )
    if self.head_dim % 2:
      raise ValueError(f'architecture.head_dim = {self.head_dim} must be even (RoPE)')
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(f'{name} = {getattr(self, name)!r} is none of {choices}')
    k = self.experts_per_token
    if k > self.experts or (k > 0) != (self.experts > 0):
      raise ValueError(
        f'architecture.experts_per_token = {k} must be in 1…{self.experts}, the number of '
        'experts; 0 of a dense model'
      )
    if not self.experts:
      for name in ('renormalise', 'balance_coef', 'router_z_coef'):
        if getattr(self, name):
          raise ValueError(f'{name} = {getattr(self, name)}: this model has no experts')
