import re

from educe.measurement import page_markup
from educe.measurement.transcript_page import page

ROW = dict(
  prompt='q',
  completion='c',
  reward=1.0,
  outcome='verified',
  tokens=['c'],
  advantages=[1.0],
  log_ratio=[0.1],
)


def test_the_page_needs_nothing_from_outside_and_may_not_load_it(tmp_path):
  text = page([ROW], tmp_path / 'page.html').read_text()
  assert re.search(r'(https?:)?//|\burl\(|@import|\bsrc=|\bhref=|fetch\(', text) is None
  assert "default-src 'none'" in text
  assert '<meta charset="utf-8">' in text
  assert '$' not in text


def test_every_class_and_colour_that_is_used_is_styled(tmp_path):
  text = page([ROW], tmp_path / 'page.html').read_text()
  style = page_markup.STYLE
  for name in ('a-plus', 'a-minus', 'r-plus', 'r-minus', 'facts', 'prompt', 'control'):
    assert f'.{name}' in style
  for name in set(re.findall(r'data-show="(\w+)"', text)):
    assert f'.{name} .t' in style
    assert name in re.search(r'<body class="([^"]+)"', text)[1].split()
  light, dark = style.split('@media (prefers-color-scheme: dark)')
  dark = dark[: dark.index('\n}')]
  colours = set(re.findall(r'(--[\w-]+): #', light))
  assert colours == set(re.findall(r'(--[\w-]+): #', dark))
  used = set(re.findall(r'var\((--[\w-]+)[,)]', style))
  assert used - colours == {'--a', '--r', '--hue', '--line-hue'}


def luminance(colour):
  colour = colour if len(colour) == 6 else ''.join(2 * c for c in colour)
  channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_readable_on_every_ground_in_both_modes():
  """Contrast of at least 4.5, the AA line of WCAG 2.2 (1.4.3)."""
  for mode in page_markup.STYLE.split('@media (prefers-color-scheme: dark)'):
    colours = {}
    for name, value in re.findall(r'--([\w-]+): #(\w+)', mode):
      colours.setdefault(name, value)
    pairs = [('ink', ground) for ground in ('paper', 'card', 'plus', 'minus')]
    fonts = ('soft', 'good', 'bad', 'other')
    pairs += [(text, ground) for text in fonts for ground in ('paper', 'card')]
    for text, ground in pairs:
      high, low = sorted((luminance(colours[text]), luminance(colours[ground])))[::-1]
      assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
