"""Published sizes, to the parameter."""

import pytest

from educe.models import policy, presets


@pytest.mark.parametrize(
  ('name', 'parameters'),
  [
    ('stories260k', 260_032),
    ('smollm2_135m', 134_515_008),
    ('smollm2_1_7b', 1_711_376_384),
    ('llama2_7b', 6_738_415_616),
    ('llama3_8b', 8_030_261_248),
    ('llama3_70b', 70_553_706_496),
  ],
)
def test_parameter_count(name, parameters):
  assert policy.count(policy.shapes(presets.get(name))) == parameters


def test_an_unknown_name_lists_the_known_ones():
  with pytest.raises(
    ValueError, match=r"'gpt5'; there are \['chain', 'chain_8m', 'debug'"
  ):
    presets.get('gpt5')
