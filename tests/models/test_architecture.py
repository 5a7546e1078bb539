"""What describes a decoder: plain values, refused where no decoder could have them."""

import dataclasses
import json

import pytest

from educe.models import presets
from educe.models.architecture import Architecture


@pytest.mark.parametrize(
  ('change', 'complaint'),
  [
    ({'kv_heads': 3}, 'multiple of kv_heads = 3'),
    ({'head_dim': 7}, 'head_dim = 7 must be even'),
    ({'layers': 0}, 'layers = 0 must be positive'),
    ({'remat': 'some'}, "remat = 'some' is none of"),
    ({'compute_dtype': 'f32'}, "compute_dtype = 'f32' is none of"),
  ],
)
def test_an_impossible_architecture_says_why(change, complaint):
  with pytest.raises(ValueError, match=complaint):
    dataclasses.replace(presets.get('debug'), **change)


def test_an_architecture_goes_through_json_unchanged():
  for name in ('debug', 'llama3_8b'):
    architecture = presets.get(name)
    text = json.dumps(dataclasses.asdict(architecture))
    assert Architecture(**json.loads(text)) == architecture


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(experts_per_token=0), 'experts_per_token = 0 must be in 1…8'),
    (dict(experts_per_token=9), 'experts_per_token = 9 must be in 1…8'),
    (dict(experts=0), 'experts_per_token = 2 must be in 1…0, .*; 0 of a dense'),
    (dict(experts=-1), r'architecture\.experts = -1 must be'),
    (dict(qk_norm='heads'), "qk_norm = 'heads' is none of"),
    (dict(balance_coef=-0.1), r'balance_coef = -0\.1 must be at least 0'),
    (dict(router_z_coef=float('nan')), 'router_z_coef = nan must be at least 0'),
    (dict(experts=0, experts_per_token=0), 'renormalise = True: this model has no exp'),
  ],
)
def test_a_mixture_that_cannot_be_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(presets.debug_moe, **change)
