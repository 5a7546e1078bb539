"""Extraction is tested on what models write and on what policies learn to write."""

import time
from fractions import Fraction

import pytest

from educe.environments.answers import boxed, extract, number, tagged, visible


@pytest.mark.parametrize(
  ('text', 'reference', 'answer'),
  [
    ('15 - 43 = -28', '-28', '-28'),
    ('43-28', '-28', '28'),  # a minus between numbers is no sign
    ('x = 1,234.', '1234', '1234'),
    ('about 57.00', '57', '57'),
    ('57.5', '57', '57.5'),
    ('0.3125', '0.3125', '0.3125'),
    ('−7', '-7', '-7'),
    ('first 3, then 4', '3', '4'),
    ('no digits', '3', None),
    ('<answer>3</answer> or <answer> 5 </answer> 9', '5', '5'),
    ('<answer><answer>5</answer>', '5', '5'),
    ('<answer></answer> 5', '5', None),
    (r'\boxed{2} then \boxed{3}', '3', '3'),
    ('reasoning\nAnswer: Friday.', 'Friday', 'Friday'),
    ('The answer is 5 days', '5 days', '5 days'),
    ('The final answer is: yes\n\n', 'yes', 'yes'),
    ('It ends.', 'It ends.', 'It ends.'),
    ('1 0\n0 1', '1 0\n0 1', '1 0\n0 1'),
    ('<think>5</think>6', '5', '6'),
    ('<think></think>', '5', None),
    ('<think>the answer is 5', '5', None),
    ('5</think><think>6', '5', None),
    ('   \n', 'yes', None),
    ('anything', None, 'anything'),
    (r'first \boxed{2} then \boxed{3}', '2', '3'),
    (r'\boxed{2} then \boxed{3', '2', None),  # cut off: 2 was taken back
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}', r'\frac{1}{2}'),
    (r'<think>\boxed{5}</think>', '5', None),
    (r'<think>6</think><think>5</think>', '5', None),
    ('<think></think><answer>5</answer>', '5', '5'),
    ('a loss of -$1,250', '-1250', '-1250'),
    (r'it costs \$5.', '5', '5'),
    ('2, 3', '3', '3'),
    ('1.2.3', '3', '3'),
    ('so...18', '18', '18'),
    ('It is .5', '0.5', '.5'),
    ('#### 1,234', '1234', '1234'),
  ],
)
def test_extraction(text, reference, answer):
  assert extract(text, reference) == answer


@pytest.mark.parametrize(
  ('text', 'content'),
  [
    ('none', None),
    (r'\boxed{}', ''),
    (r'\boxed{ 1 }.', '1'),
    (r'\boxed{\sqrt{\frac{1}{2}}} ok', r'\sqrt{\frac{1}{2}}'),
    (r'\boxed{\{1, 2\}}', r'\{1, 2\}'),
    (r'\boxed{\left\{ 1 \right.}', r'\left\{ 1 \right.'),
    (r'\boxed{\boxed{3}}', '3'),
    (r'\boxed{1} \boxed{}', ''),
    (r'\boxed{1} \boxed{2', ''),
    ('\\boxed{2\\', ''),
    (r'boxed{3}', None),
  ],
)
def test_the_last_box_with_its_braces(text, content):
  assert boxed(text) == content


def test_only_what_follows_the_thinking_is_visible():
  assert visible('plain') == 'plain'
  assert visible('<think>a</think>b') == 'b'
  assert visible('a</think>b') == 'b'  # opened by the chat template
  assert visible('<think></think>') == ''
  assert visible('<think>a') is None
  assert visible('<think>a</think>b<think>c') is None
  assert tagged('<answer>\n5\n</answer>') == '5'
  assert tagged('<answer>5') is None


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('18', 18),
    ('-18', -18),
    ('−18', -18),
    ('+18', 18),
    ('18.', 18),
    ('18.00', 18),
    ('.5', Fraction(1, 2)),
    ('1,234,567.25', Fraction(4938269, 4)),
    ('1{,}234', 1234),
    ('1,23', None),
    ('12,345,67', None),
    ('$18', 18),
    (r'\$18.50', Fraction(37, 2)),
    ('$18$', 18),
    ('-$5', -5),
    ('$-5', -5),
    ('£5', 5),
    ('50%', 50),
    (r'50\%', 50),
    ('50 percent', 50),
    ('18 dollars', 18),
    ('5 apples per day', 5),
    (r'18\text{ km}', 18),
    (r'18\,\mathrm{cm}', 18),
    ('5 m', 5),
    ('2 x', None),
    ('2x', None),
    ('3 million', None),
    ('5 and a half', None),
    ('5 or 6', None),
    ('5 dozens', None),
    ('1/2', Fraction(1, 2)),
    ('-3 / 4', Fraction(-3, 4)),
    (r'\frac{1}{2}', Fraction(1, 2)),
    (r'-\dfrac{3}{4}', Fraction(-3, 4)),
    ('1/0', None),
    (r'\frac{1}{0}', None),
    ('1e5', None),
    ('x = 5', None),
    ('five', None),
    ('', None),
    ('٣', None),
    ('9' * 5000, None),
    ('9' * 150, int('9' * 150)),
  ],
)
def test_numbers(text, value):
  assert number(text) == value


LONG = ('1,', '<answer>', '\\boxed{', '- $', '1', '<think>', 'a ', '1.', 'x\n', ',111')


@pytest.mark.parametrize(
  'text', [*(piece * 20_000 for piece in LONG), '5 ' + 'a' * 190, '5' + ' a' * 90]
)
def test_no_text_takes_long(text):
  start = time.monotonic()
  for reference in ('5', 'x', '1\n2', None):
    extract(text, reference)
  number(text)
  assert time.monotonic() - start < 2
