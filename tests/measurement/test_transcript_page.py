import html.parser
import re

import numpy as np
import pytest

from educe.measurement.transcript_page import page


class Reader(html.parser.HTMLParser):
  """Elements with their attributes, and the text inside each class, as a browser sees."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.stack, self.texts = [], [], {}
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.elements.append((tag, attributes))
    if tag not in ('meta', 'input', 'link', 'img', 'br'):
      self.stack.append((tag, (attributes.get('class') or tag).split()[0]))

  def handle_endtag(self, tag):
    while self.stack and self.stack.pop()[0] != tag:
      pass

  def handle_data(self, data):
    for name in {name for _, name in self.stack}:
      self.texts[name] = self.texts.get(name, '') + data

  def tokens(self):
    return [
      a for tag, a in self.elements if (a.get('class') or '').split()[:1] == ['t']
    ]


def row(**changes):
  base = dict(
    id='p0',
    step=3,
    prompt='one plus one',
    completion='two',
    answer='2',
    reward=1.0,
    rewards={'correct': 1.0, 'format': None},
    outcome='verified',
    length=1,
    stopped=True,
    advantage=0.5,
  )
  return base | changes


def read(rows, tmp_path, **options):
  path = page(rows, tmp_path / 'deep' / 'page.html', **options)
  assert path == tmp_path / 'deep' / 'page.html'
  return Reader(path.read_text(encoding='utf-8'))


HOSTILE = (
  '</span></script><script>alert(1)</script><img src=x onerror=alert(1)>'
  '" onmouseover="alert(1) \' $title ${style} &amp; <!-- ]]>'
)


def test_hostile_text_is_shown_and_never_markup(tmp_path):
  plain = read([row(tokens=['two'], advantages=[1.0])], tmp_path)
  rows = [
    row(
      id=HOSTILE,
      step=HOSTILE,
      prompt=[{'role': HOSTILE, 'content': HOSTILE}],
      answer=HOSTILE,
      rewards={HOSTILE: 0.5, 'other': None},
      length=HOSTILE,
      tokens=[HOSTILE],
      advantages=[1.0],
    )
  ]
  hostile = read(rows, tmp_path, title=HOSTILE)
  # The same elements with the same attributes, whatever the texts say.
  shape = [(t, sorted(a)) for t, a in plain.elements]
  prompt = ('small', [])
  assert [e for e in shape if e != prompt] == [
    (t, sorted(a)) for t, a in hostile.elements if (t, sorted(a)) != prompt
  ]
  assert hostile.texts['t'] == HOSTILE
  assert hostile.texts['bdi'] == HOSTILE
  assert hostile.texts['prompt'] == f'{HOSTILE} {HOSTILE}'
  assert hostile.texts['h1'] == hostile.texts['title'] == HOSTILE
  assert hostile.texts['facts'].count(HOSTILE) == 2
  source = (tmp_path / 'deep' / 'page.html').read_text()
  assert 'onmouseover=&quot;' in source
  assert 'onmouseover="' not in source
  without = read([row(completion=HOSTILE)], tmp_path)
  assert without.texts['completion'] == HOSTILE


def test_what_cannot_be_seen_is_shown_as_its_code(tmp_path):
  text = 'a\x00b\x1b[31m\r\ud800\u202e\u2066é\t\nשלום'
  page_ = read([row(completion=text)], tmp_path, title='t\ud800\x00')
  shown = 'a00b1B[31m0DD800202E2066é\t\nשלום'
  assert page_.texts['completion'] == shown
  assert page_.texts['control'].startswith('D80000')  # of the heading
  assert page_.texts['title'] == 't'
  directions = [
    a.get('dir') for _, a in page_.elements if a.get('class') == 'completion'
  ]
  assert directions == ['auto']
  empty = read([row(completion='')], tmp_path)
  assert empty.texts['completion'] == 'empty'


def test_groups_stand_together_in_order_of_appearance(tmp_path):
  rows = [
    row(id='b', completion='B0', reward=0.0, outcome='wrong'),
    row(id='a', completion='A0', reward=0.25, outcome='unparsable'),
    row(id='b', completion='B1', reward=1.0),
    row(id='b', step=4, completion='B2', reward=None, outcome='error'),
    row(id=None, completion='C0'),
    row(id=None, completion='C1'),
    row(id='1', completion='D0'),
    row(id=1, completion='D1'),
  ]
  path = page(rows, tmp_path / 'page.html')
  sections = path.read_text().split('<section>')[1:]
  found = [re.findall(r'>([ABCD]\d)<', section) for section in sections]
  expected = [['B0', 'B1'], ['A0'], ['B2'], ['C0'], ['C1'], ['D0'], ['D1']]
  assert found == expected
  heads = [Reader('<section>' + section).texts for section in sections]
  assert heads[0]['h2'] == 'step 3 · b 0 1'
  assert heads[2]['h2'] == 'step 4 · b –'
  assert heads[3]['h2'] == 'step 3 1'
  assert 'right is 2' in heads[0]['answer']


def test_counts_are_of_outcomes_and_the_mean_of_scored_rewards(tmp_path):
  rows = [
    row(reward=1.0),
    row(reward=0.2, outcome='wrong'),
    row(reward=None, outcome='timeout'),
    row(reward=float('nan'), outcome='timeout'),
  ]
  counts = read(rows, tmp_path).texts['counts'].split('\n')
  assert [c for c in counts if c] == [
    '4 completions',
    'verified 1 25%',
    'wrong 1 25%',
    'timeout 2 50%',
    'mean reward 0.6',
  ]
  assert read([], tmp_path).texts['counts'].strip() == '0 completions'


def test_facts_of_a_completion(tmp_path):
  facts = read([row(stopped=False, advantage=-1.5)], tmp_path).texts['facts']
  assert facts == (
    'verified · reward 1 · correct 1 · format – · advantage −1.5 · 1 token · cut off'
  )
  bare = dict(prompt='q', completion='c', reward=None, outcome='wrong')
  assert read([bare], tmp_path).texts['facts'] == 'wrong · reward –'


def test_tokens_are_coloured_by_sign_and_size_on_one_scale(tmp_path):
  rows = [
    row(
      tokens=['a', 'b', 'c', 'd', 'e'],
      advantages=[2.0, -1.0, 0.0, None, float('nan')],
      log_ratio=np.array([-0.1, 0.2, 0.0, -0.4, np.inf], np.float32),
    ),
    row(id='other', tokens=['f'], advantages=[-4.0]),
  ]
  result = read(rows, tmp_path)
  tokens = result.tokens()
  seen = [(t['class'], t.get('style'), t['title']) for t in tokens]
  assert seen[0] == (
    't a-plus r-minus',
    '--a:0.500;--r:0.250',
    'token 0 · advantage +2 · log-ratio −0.1 nats',
  )
  assert seen[1][:2] == ('t a-minus r-plus', '--a:0.250;--r:0.500')
  assert seen[2][1] == '--a:0.000;--r:0.000'
  assert seen[3] == (
    't r-minus',
    '--r:1.000',
    'token 3 · advantage – · log-ratio −0.4 nats',
  )
  assert seen[4] == ('t', None, 'token 4 · advantage – · log-ratio –')
  assert seen[5] == ('t a-minus', '--a:1.000', 'token 0 · advantage −4')
  assert '−4+4' in result.texts['scale']
  assert '−0.4+0.4 nats' in result.texts['scale']
  shown = [a['data-show'] for _, a in result.elements if 'data-show' in a]
  assert shown == ['advantages', 'log_ratio']


def test_one_absurd_token_does_not_pale_the_rest(tmp_path):
  values = [0.0] * 50 + [0.1] * 999 + [30.0]
  result = read([row(tokens=['x'] * 1050, log_ratio=values)], tmp_path)
  styles = [t['style'] for t in result.tokens()]
  assert styles[0] == '--r:0.000'
  assert styles[50] == styles[-1] == '--r:1.000'
  zeros = read([row(tokens=['x'], log_ratio=[0.0])], tmp_path)
  assert 'style' not in zeros.tokens()[0]


def test_without_numbers_per_token_there_is_no_legend(tmp_path):
  assert 'legend' not in read([row(tokens=['t', 'wo'])], tmp_path).texts
  assert 'scale' not in read([row()], tmp_path).texts


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(outcome='right'), r"row 1: outcome='right' is not one of \('verified'"),
    (dict(reward='1'), r"row 1: reward='1' is not a number"),
    (dict(advantage=[1]), r'row 1: advantage=\[1\] is not a number'),
    (dict(rewards={'a': 'b'}), r"row 1: rewards\['a'\]='b' is not a number"),
    (dict(rewards=[1.0]), r'row 1: rewards=\[1.0\] is not a dict'),
    (dict(completion=None), r'row 1: completion=None is not a text'),
    (dict(prompt=None), r'row 1: prompt=None is neither a text nor messages'),
    (dict(log_ratio=[1.0]), r'row 1 has log_ratio but no tokens'),
    (
      dict(tokens=['a', 'b'], log_ratio=[0.0]),
      r'row 1: log_ratio has 1 numbers for 2 tokens',
    ),
    (dict(tokens=['a'], advantages=['x']), r"row 1: advantages='x' is not a number"),
  ],
)
def test_a_bad_row_is_one_clear_line(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message) as error:
    page([row(), row(**changes)], tmp_path / 'page.html')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'page.html').exists()


def test_a_missing_key_and_a_row_that_is_none_are_named(tmp_path):
  lacking = row()
  del lacking['reward'], lacking['outcome']
  with pytest.raises(ValueError, match=r"row 0 lacks \['reward', 'outcome'\]; it has"):
    page([lacking], tmp_path / 'page.html')
  with pytest.raises(ValueError, match=r"row 0 is 'text'; a row is a dict"):
    page(['text'], tmp_path / 'page.html')
