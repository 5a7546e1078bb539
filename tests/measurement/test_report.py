"""A page that stands alone, and says what was measured."""

import html.parser
import json
import pathlib
import re

import numpy as np
import pytest

from educe.measurement import findings, report, report_figures, table, verdict

SAMPLES = 16


def side(right, rng, texts):
  rewards = (rng.random((3, SAMPLES)) < np.array(right)[:, None]).astype(float)
  logp = -1 - rng.random((2, 3, SAMPLES))
  wrote = [[f'{texts} {int(x)}' for x in row] for row in rewards]
  outcomes = [['verified' if x else 'wrong' for x in row] for row in rewards]
  return table.Side(
    rewards, *logp, np.full((3, SAMPLES), 4.0), np.ones((3, SAMPLES)), wrote, outcomes,
    wrote,
  )  # fmt: skip


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  rng = np.random.default_rng(0)
  header = dict(
    base='runs/a/base',
    policy='runs/a/<i>ours',
    environment=dict(name='reasoning_gym', task='sums', part='heldout'),
    decoding=dict(max_new_tokens=16, temperature=1.0, seed=0),
  )
  chat = [{'role': 'user', 'content': 'the <third> prompt'}]
  data = table.Table(
    header,
    ['one', 'two', 'three'],
    ['first', 'second', chat],
    ['a', 'b', 'c'],
    side([0.0, 0.3, 0.6], rng, '<script>alert(1)</script>'),
    side([1.0, 0.7, 0.0], rng, 'ours'),
  )
  folder = tmp_path_factory.mktemp('report') / 'new' / 'folder'
  return data, report.write(data, folder, budget=3)


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_it_was_told(written):
  page = written[1].page.read_text()
  assert "default-src 'none'" in page
  assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
  assert '<script>alert' not in page
  assert '&lt;script&gt;alert' in page
  assert '<i>ours' not in page
  assert page.count('data:image/png') == len(report_figures.PANELS)


def test_the_page_is_well_formed(written):
  open_tags = []

  class Reader(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      if tag not in ('meta', 'img', 'input'):
        open_tags.append(tag)

    def handle_endtag(self, tag):
      assert open_tags.pop() == tag

  Reader().feed(written[1].page.read_text())
  assert open_tags == []


def test_it_holds_the_verdict_the_numbers_and_both_sides_of_examples(written):
  _data, got = written
  text = re.sub(r'<[^>]+>', '', got.page.read_text())
  text = html.unescape(text)
  assert got.verdict.sentence in text
  for line in got.verdict.evidence:
    assert line in text
  assert f'{got.findings.base.rate[0]:.1%}' in text
  assert 'Gained most' in text
  assert 'Lost most' in text
  assert 'the <third> prompt' in text
  assert 'ours 1' in text
  assert 'a/base' in text
  assert 'sums, heldout' in text
  assert 'at most 16 tokens' in text


def cells(page):
  """{first cell of a row: the others}."""
  rows = re.findall(r'<tr>(.*?)</tr>', page)
  split = [re.findall(r'<td>(.*?)</td>', row) for row in rows]
  return {
    html.unescape(row[0]): [html.unescape(x) for x in row[1:]] for row in split if row
  }


def test_every_number_stands_in_its_own_column(written):
  found = written[1].findings
  rows = cells(written[1].page.read_text())
  moved, gap, chance = found.dynamics[1], found.comparison, found.twice[1]

  def ratio(x):
    return f'{x.value:.2f} ({x.low:.2f} to {x.high:.2f})'

  assert rows['2'] == [
    f'{found.base.rate[1]:.1%}',
    f'{found.policy.rate[1]:.1%}',
    f'{100 * gap.difference[1]:+.1f} ({100 * gap.low[1]:+.1f} to {100 * gap.high[1]:+.1f})',
    ratio(moved.srr),
    ratio(moved.ndr),
    ratio(moved.nscr),
    ratio(chance.srr),
  ]
  spent = found.spending
  assert rows['E r − β·KL of the policy, of the most there is at that β'] == [
    f'{spent.objective:.4g} of {spent.soft_value:.4g}'
  ]
  assert rows['KL, mean of log-ratios, nats a sequence'] == [
    f'{found.divergence.per_sequence}'
  ]
  assert rows['largest ratio of probabilities'] == [f'{found.certificate}']
  page = written[1].page.read_text()
  up, down = found.dynamics[0].up, found.dynamics[0].down
  assert f'{up} prompts went up and {down} down' in page


def test_only_prompts_that_moved_beyond_chance_are_shown():
  base = np.array([[1] * 8 + [0] * 8, [1] * 16, [0] * 16], float)
  policy = np.array([[1] * 10 + [0] * 6, [0] * 16, [1] * 16], float)
  assert report._apart(base, policy).tolist() == [False, True, True]


def test_prompts_that_moved_most_come_first(written):
  _, got = written
  text = got.page.read_text()
  gained, lost = text.index('Gained most'), text.index('Lost most')
  gap = got.findings.rates[:, 1] - got.findings.rates[:, 0]
  assert gap[0] > 0 > gap[2]
  assert gained < text.index('>one ') < lost < text.index('>three ')


def test_findings_are_kept_as_numbers(written):
  data, got = written
  kept = json.loads((got.page.parent / report.FINDINGS).read_text())
  again = findings.of_table(data, budget=3)
  assert kept['verdict']['word'] == verdict.judge(again).word == got.verdict.word
  assert kept['budget'] == 3
  np.testing.assert_allclose(kept['rates'], again.rates)
  np.testing.assert_allclose(
    kept['spending']['total']['mean'], again.spending.total.mean
  )
  assert report.plain((np.float64('nan'), np.bool_(True), np.int32(3))) == [
    None,
    True,
    3,
  ]


def test_a_prompt_shows_a_right_and_a_wrong_sample_where_there_are_both(written):
  data, _ = written
  for samples in (data.base, data.policy):
    for at in range(3):
      rewards = samples.rewards[at, list(report._chosen(samples, at))]
      assert len(rewards) == report.EACH
      assert set(rewards) == set(samples.rewards[at])


def test_names_are_short(written):
  assert report.name(written[0], 'base') == 'a/base'
  assert isinstance(written[1].picture, pathlib.Path)
  assert written[1].picture.is_file()
