"""Architectures by name, with the published sizes."""

from __future__ import annotations

from educe.models.architecture import Architecture

# For tests and `:debug` runs: every feature on (grouped queries, untied head), no size.
debug = Architecture(
  vocab_size=264,
  dim=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  ffn=64,
  max_length=256,
)

# The chain world (environments/chain.py): 16 tokens, at most 5 + 5 of them a document.
chain = Architecture(
  vocab_size=16,
  dim=64,
  layers=2,
  heads=4,
  kv_heads=4,
  head_dim=16,
  ffn=256,
  max_length=16,
  tied=True,
)

# … and with room: 8,397,056. The weight of a small language model, on the same tokens.
chain_8m = Architecture(
  vocab_size=16,
  dim=256,
  layers=8,
  heads=8,
  kv_heads=8,
  head_dim=32,
  ffn=1024,
  max_length=16,
  tied=True,
)

# The language world (environments/language.py): 18 tokens, 3 + 4 + 1 of them a document.
language = Architecture(
  vocab_size=18,
  dim=48,
  layers=2,
  heads=3,
  kv_heads=3,
  head_dim=16,
  ffn=128,
  max_length=16,
  tied=True,
)

# TinyStories (Eldan & Li 2023, arXiv:2305.07759), trained by llama2.c: 260,032.
stories260k = Architecture(
  vocab_size=512,
  dim=64,
  layers=5,
  heads=8,
  kv_heads=4,
  head_dim=8,
  ffn=172,
  max_length=512,
  tied=True,
)

# SmolLM2 (Allal et al. 2025, arXiv:2502.02737): 134,515,008 and 1,711,376,384.
smollm2_135m = Architecture(
  vocab_size=49_152,
  dim=576,
  layers=30,
  heads=9,
  kv_heads=3,
  head_dim=64,
  ffn=1536,
  max_length=8192,
  rope_theta=100_000.0,
  tied=True,
)
smollm2_1_7b = Architecture(
  vocab_size=49_152,
  dim=2048,
  layers=24,
  heads=32,
  kv_heads=32,
  head_dim=64,
  ffn=8192,
  max_length=8192,
  rope_theta=130_000.0,
  tied=True,
)

# Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288): 6,738,415,616.
llama2_7b = Architecture(
  vocab_size=32_000,
  dim=4096,
  layers=32,
  heads=32,
  kv_heads=32,
  head_dim=128,
  ffn=11_008,
  max_length=4096,
)

# Llama 3 8B (Dubey et al. 2024, arXiv:2407.21783): 8,030,261,248. The 3.1 and 3.2
# models rescale their rotary frequencies and are not this architecture.
llama3_8b = Architecture(
  vocab_size=128_256,
  dim=4096,
  layers=32,
  heads=32,
  kv_heads=8,
  head_dim=128,
  ffn=14_336,
  max_length=8192,
  rope_theta=500_000.0,
)
# … and 70B: 70,553,706,496.
llama3_70b = Architecture(
  vocab_size=128_256,
  dim=8192,
  layers=80,
  heads=64,
  kv_heads=8,
  head_dim=128,
  ffn=28_672,
  max_length=8192,
  rope_theta=500_000.0,
)

# Qwen3 (Yang et al. 2025, arXiv:2505.09388): 32,762,123,264, and of 30,532,122,624 a token
# meets 3,353,032,704.
qwen3_32b = Architecture(
  vocab_size=151_936,
  dim=5120,
  layers=64,
  heads=64,
  kv_heads=8,
  head_dim=128,
  ffn=25_600,
  max_length=40_960,
  rope_theta=1_000_000.0,
  norm_eps=1e-6,
  qk_norm='head',
)
qwen3_30b_a3b = Architecture(
  vocab_size=151_936,
  dim=2048,
  layers=48,
  heads=32,
  kv_heads=4,
  head_dim=128,
  ffn=768,
  max_length=40_960,
  rope_theta=1_000_000.0,
  norm_eps=1e-6,
  qk_norm='head',
  experts=128,
  experts_per_token=8,
  renormalise=True,
)

# OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): 6,919,161,856, of which a token meets
# 1,282,017,280. It was trained with balance_coef 0.01 and router_z_coef 0.001.
olmoe_1b_7b = Architecture(
  vocab_size=50_304,
  dim=2048,
  layers=16,
  heads=16,
  kv_heads=16,
  head_dim=128,
  ffn=1024,
  max_length=4096,
  qk_norm='whole',
  experts=64,
  experts_per_token=8,
)

# Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088): 46,702,792,704, of which a token meets
# 12,879,925,248.
mixtral_8x7b = Architecture(
  vocab_size=32_000,
  dim=4096,
  layers=32,
  heads=32,
  kv_heads=8,
  head_dim=128,
  ffn=14_336,
  max_length=32_768,
  rope_theta=1_000_000.0,
  experts=8,
  experts_per_token=2,
  renormalise=True,
)

# For tests: a mixture as small as `debug`, with every other feature on.
debug_moe = Architecture(
  vocab_size=264,
  dim=32,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  ffn=16,
  max_length=256,
  qk_norm='head',
  experts=8,
  experts_per_token=2,
  renormalise=True,
)


def get(name: str) -> Architecture:
  """The preset called `name`; raises ValueError that lists them."""
  known = {key: x for key, x in globals().items() if isinstance(x, Architecture)}
  if name not in known:
    raise ValueError(f'no architecture is called {name!r}; there are {sorted(known)}')
  return known[name]
