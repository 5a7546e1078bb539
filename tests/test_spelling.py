import pytest

from educe.spelling import near, siblings

MANY = [f'{a}{b}' for a in 'abcdefgh' for b in 'wxyz']


@pytest.mark.parametrize(
  ('word', 'names', 'want'),
  [
    ('debgu', ['demo', 'gsm8k', 'debug'], "; did you mean 'debug'?"),
    ('learning_rat', iter(['eps', 'learning_rate']), "; did you mean 'learning_rate'?"),
    ('zzz', ['b', 'a', 'b'], "; choose one of ['a', 'b']"),
    ('zzz', [], ''),
    ('ca?', MANY, '; there are 32, such as bx, by, bz, cw, cx, cy'),
    ('0', MANY, '; there are 32, such as aw, ax, ay'),
    ('zzz', MANY, '; there are 32, such as hx, hy, hz'),
  ],
)
def test_near(word, names, want):
  assert near(word, names) == want


def test_siblings_have_the_function():
  found = sorted(siblings('educe.losses.nothing', 'loss'))
  assert found == ['distillation', 'dpo', 'grpo', 'ppo', 'reward_model', 'sft']
  assert 'chain' in (found := siblings('educe.environments.nothing', 'make'))
  assert 'verifiers' not in found
  assert siblings('no_such_package.nothing', 'make') == []
