"""The sizes of gpu.py: what an H200 is given, and what a test runs anywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from step_work import ONE_BILLION

from educe.models import presets
from educe.models.architecture import Architecture


class Head(NamedTuple):
  """What the log-prob is asked of: N tokens, D wide, V entries."""

  tokens: int
  width: int
  vocab: int


class Size(NamedTuple):
  copied: int  # bytes
  square: int  # side of a matmul
  heads: Mapping[str, Head]
  chunks: tuple[int, ...]  # tokens at a time
  checked: int  # tokens compared with float64
  models: Mapping[str, Architecture]
  rows: int  # of a training batch
  length: int
  batches: tuple[int, ...]  # rows decoded side by side
  prompt: int
  new_tokens: int
  group: int  # completions of a prompt
  seeds: tuple[int, ...]
  science: tuple[str, ...]  # flags of the chain world's runs
  repeats: int


def stages(flag: str) -> tuple[str, ...]:
  """The flag, for either stage of a chain run."""
  return tuple(f'--config.{stage}.{flag}' for stage in ('pretrain', 'grpo'))


SIZES = {
  'h200': Size(
    copied=4 << 30,
    square=8192,
    heads={
      'llama3_8b': Head(16384, 4096, 128_256),
      'qwen3_0.6b': Head(16384, 1024, 151_936),
    },
    chunks=(2048, 4096, 8192),
    checked=32,
    models={'135m': presets.smollm2_135m, '1b': ONE_BILLION},
    rows=16,
    length=1024,
    batches=(64, 256, 1024),
    prompt=128,
    new_tokens=128,
    group=16,
    seeds=(0, 1, 2),
    science=(
      *stages('model.preset=chain_8m'),
      '--config.pretrain.optimizer.learning_rate=1e-3',
      '--config.grpo.optimizer.learning_rate=2e-4',
    ),
    repeats=7,
  ),
  'tiny': Size(
    copied=1 << 16,
    square=64,
    heads={'llama3_8b': Head(48, 32, 256), 'qwen3_0.6b': Head(40, 16, 300)},
    chunks=(16, 32),
    checked=8,
    models={'135m': presets.debug, '1b': dataclasses.replace(presets.debug, tied=True)},
    rows=4,
    length=16,
    batches=(2, 4),
    prompt=4,
    new_tokens=6,
    group=2,
    seeds=(0,),
    science=(
      *stages('steps=2'),
      *stages('optimizer.warmup_steps=0'),
      *stages('evaluation.repeats=1'),
      '--config.grpo.evaluate_every=2',
      '--config.pretrain.source.size=500',
    ),
    repeats=1,
  ),
}
