"""A report of one run, or of any two policies: a page by itself, and its pictures.

  folder/report.html    the verdict, what it rests on, examples; opens anywhere, asks for
                        nothing from elsewhere
  folder/verdict.png    its six pictures in one; each alone beside it
  folder/findings.json  its numbers

Written for a reader who has seen neither the code nor the run.
"""

from __future__ import annotations

import base64
import html
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from educe import paths
from educe.measurement import (
  findings,
  free_energy,
  page_markup,
  pass_at_k,
  report_figures,
  report_words,
  support,
  transcript_page,
  verdict,
)
from educe.measurement.findings import LADDER, REACH, Findings
from educe.measurement.pass_at_k import Curve
from educe.measurement.support import Reach
from educe.measurement.table import Side, Table
from educe.measurement.transcript_page import text

PAGE, FINDINGS = 'report.html', 'findings.json'
EXAMPLES, EACH = 5, 2  # prompts of a kind, completions of each side


class Report(NamedTuple):
  findings: Findings
  verdict: verdict.Verdict
  page: pathlib.Path
  picture: pathlib.Path


def write(
  table: Table, folder: pathlib.Path, *, budget: int = findings.REACH
) -> Report:
  """Measures the table and writes all of it into `folder`.

  budget: k of the verdict, samples of the base

  Raises ValueError as `findings.of_table`.
  """
  found = findings.of_table(table, budget=budget)
  said = verdict.judge(found)
  title = f'{_heading(found, said)}: {name(table, "policy")} from {name(table, "base")}'
  picture = report_figures.draw(found, folder, title=title)
  paths.write(
    folder / FINDINGS,
    json.dumps({'verdict': plain(said), **plain(found)}, indent=1) + '\n',
  )
  images = {key: (folder / f'{key}.png').read_bytes() for key in report_figures.PANELS}
  page = page_markup.PAGE.substitute(
    name=html.escape(title),
    title=text(_heading(found, said)),
    style=page_markup.STYLE + report_words.STYLE,
    script=page_markup.SCRIPT,
    counts=_facts(table, found),
    legend='',
    groups='\n'.join(_sections(table, found, said, images)),
  )
  paths.write(folder / PAGE, page)
  return Report(found, said, folder / PAGE, picture)


def _heading(found: Findings, said: verdict.Verdict) -> str:
  """A word never stands without its budget."""
  budgets = {
    'elicitation': f' within {found.budget:,} samples',
    'creation': f' beyond {found.denied:,} samples',
  }
  return said.word + budgets.get(said.word, '')


def name(table: Table, side: str) -> str:
  """The last two parts of a policy's path, which say enough."""
  return '/'.join(str(table.header.get(side, side)).rstrip('/').split('/')[-2:])


def plain(x: Any) -> Any:
  """Named tuples and arrays as JSON has them; a number that is not finite is null."""
  if hasattr(x, '_asdict'):
    return {key: plain(value) for key, value in x._asdict().items()}
  if isinstance(x, np.ndarray | list | tuple):
    return [plain(value) for value in x]
  if isinstance(x, np.generic):
    return plain(x.item())
  if isinstance(x, float) and not math.isfinite(x):
    return None
  return x


def _facts(table: Table, found: Findings) -> str:
  header = table.header
  decoding = header.get('decoding', {})
  environment = header.get('environment') or {}
  facts = [
    f'policy <b>{text(name(table, "policy"))}</b>',
    f'base <b>{text(name(table, "base"))}</b>',
    f'<b>{len(found.rates)}</b> prompts × <b>{found.samples}</b> samples of each',
  ]
  if environment:
    facts.append('on ' + text(_environment(environment)))
  if decoding:
    facts.append(
      f'temperature {decoding["temperature"]}, at most {decoding["max_new_tokens"]} tokens'
    )
  if found.left_out:
    facts.append(f'{found.left_out} prompts left out: too few scored samples')
  return '\n'.join(f'<li>{fact}</li>' for fact in facts)


def _environment(section: dict[str, Any]) -> str:
  parts = (section.get('task') or section.get('name'), section.get('part'))
  return ', '.join(str(x) for x in parts if x)


def _sections(table: Table, found: Findings, said: verdict.Verdict, images):
  yield f'<section><p class="sentence">{text(said.sentence)}</p>'
  points = ''.join(f'<li>{text(line)}</li>' for line in said.evidence)
  yield f'<ul>{points}</ul></section>'
  for key, (heading, _) in report_figures.PANELS.items():
    data = base64.b64encode(images[key]).decode()
    yield (
      f'<section><figure><img alt="{text(heading)}" '
      f'src="data:image/png;base64,{data}">'
      f'<figcaption>{text(report_words.CAPTIONS[key])}</figcaption></figure></section>'
    )
  yield _numbers(found)
  yield _others(found)
  rows = {row: at for at, row in enumerate(table.ids)}
  at = np.array([rows[name] for name in found.ids])
  gains = found.rates[:, 1] - found.rates[:, 0]
  sure = _apart(table.base.rewards[at], table.policy.rewards[at])
  order = np.argsort(-gains, kind='stable')
  for heading, chosen in (
    ('Gained most', [i for i in order if sure[i] and gains[i] > 0]),
    ('Lost most', [i for i in order[::-1] if sure[i] and gains[i] < 0]),
  ):
    yield f'<section><h2>{heading}</h2>'
    if not chosen:
      yield '<p class="note">no prompt beyond what chance may do</p>'
    for index in chosen[:EXAMPLES]:
      yield _example(table, int(at[index]), found.rates[index])
    yield '</section>'
  terms = ''.join(
    f'<dt>{text(x)}</dt><dd>{text(y)}</dd>' for x, y in report_words.GLOSSARY.items()
  )
  yield f'<section><h2>Words</h2><dl>{terms}</dl></section>'


def _numbers(found: Findings) -> str:
  head = ('k', 'base', 'policy', 'difference', 'kept', 'new', 'net', 'kept by chance')
  rows = []
  for at, k in enumerate(found.base.k.tolist()):
    gap, moved = found.comparison, found.dynamics[at]
    rows.append(
      (
        f'{k:,}',
        f'{found.base.rate[at]:.1%}',
        f'{found.policy.rate[at]:.1%}',
        f'{100 * gap.difference[at]:+.1f} '
        f'({100 * gap.low[at]:+.1f} to {100 * gap.high[at]:+.1f})',
        _ratio(moved.srr),
        _ratio(moved.ndr),
        _ratio(moved.nscr),
        _ratio(found.twice[at].srr) if at < len(found.twice) else '–',
      )
    )
  return (
    f'<section class="close"><h2>By budget</h2>{_grid(head, rows)}'
    '<p class="note">Of prompts solved in k samples: kept (SRR), new (NDR), net change '
    '(NSCR, the gained less the lost, of all that either solves). By chance: the base '
    'against itself. At k = 1 '
    f'{found.dynamics[0].up} prompts went up and {found.dynamics[0].down} down, of which '
    f'chance makes as much with p = {found.dynamics[0].p_value:.2g} (sign test).</p>'
    '</section>'
  )


def _others(found: Findings) -> str:
  spent, per_token = found.spending, found.divergence.per_token
  rows = [
    (
      'KL, mean of log-ratios, nats a sequence',
      _estimate(found.divergence.per_sequence),
    ),
    ('the same, nats a token', _number(per_token.mean)),
    ('KL to the nearest Gibbs policy, nats', _estimate(spent.distance)),
  ]
  if found.certificate is not None:
    most, own = _number(spent.soft_value), _number(spent.objective)
    rows += [
      ('its temperature β, in rewards', _number(spent.beta)),
      ('E r − β·KL of the policy, of the most there is at that β', f'{own} of {most}'),
      ('largest ratio of probabilities', f'{found.certificate}'),
    ]
  rows += [
    ('prompts without a right sample of the base', f'{found.unseen:.1%}'),
    (f'prompts accessible to the base in {REACH:,} samples', _reach(found.reach)),
    (f'right answers of the base, in {REACH:,} samples', f'{found.outputs}'),
    (f'over the base sampled twice, at k = {found.excess_k:,}', f'{found.excess}'),
  ]
  if found.missing is not None:
    rows.append(('texts of the base not yet seen', f'{found.missing}'))
  if found.nulls is not None:
    nulls = found.nulls
    worth = nulls.power.effective
    rows += [
      (
        f'the base sharpened, p^{nulls.power.alpha:.3g}, on half of the prompts'
        + ('' if worth is None else f'; its weights are worth {worth:.0f} samples'),
        _ends(nulls.power.curve),
      ),
      ('the policy against that', f'{nulls.over_power}'),
    ]
    if nulls.majority is not None:
      rows.append(('majority vote of the base', _ends(nulls.majority)))
    rows.append(
      (
        f'best of {nulls.n:.2g} of the base by the verifier: tokens of one of the policy',
        _estimate(nulls.best_of),
      )
    )
    worth_k = found.base.k[found.base.rate >= found.policy.rate[0]]
    least = f'{worth_k[0]:,}' if len(worth_k) else f'over {found.base.k[-1]:,}'
    rows.append(
      ('samples of the base, by the verifier, that one of it is worth', least)
    )
  return f'<section><h2>More numbers</h2>{_grid(("", ""), rows)}</section>'


def _apart(base: np.ndarray, policy: np.ndarray) -> np.ndarray:
  """`[P]`: whether the intervals of the two rates have nothing in common."""
  ends = [
    support.clopper_pearson(c, n) for n, c in map(pass_at_k.counts, (base, policy))
  ]
  (low, high), (ours_low, ours_high) = ends
  return (ours_low > high) | (ours_high < low)


def _example(table: Table, at: int, rates: np.ndarray) -> str:
  rows = []
  for side, samples in (('base', table.base), ('policy', table.policy)):
    rows += [_completion(table, at, side, samples, n) for n in _chosen(samples, at)]
  shown = transcript_page.group(rows, {})
  return f'<p class="note">right {rates[0]:.0%} → {rates[1]:.0%}</p>{shown}'


def _chosen(side: Side, at: int) -> Sequence[int]:
  """Samples to show: a right one and a wrong one, where there are both."""
  right = np.flatnonzero(side.rewards[at] >= 1)
  wrong = np.flatnonzero(~(side.rewards[at] >= 1))
  order = [*right[:1], *wrong[:1], *right[1:], *wrong[1:]]
  return [int(n) for n in order[:EACH]]


def _completion(table: Table, at: int, by: str, side: Side, n: int) -> dict[str, Any]:
  reward = side.rewards[at, n]
  return dict(
    id=table.ids[at],
    prompt=table.prompts[at],
    answer=table.answers[at],
    by=by,
    completion=side.texts[at][n],
    reward=None if math.isnan(reward) else float(reward),
    rewards={
      'log p of the base': float(side.logp_base[at, n]),
      'of the policy': float(side.logp_policy[at, n]),
    },
    outcome=side.outcomes[at][n],
    length=int(side.lengths[at, n]),
    stopped=bool(side.stopped[at, n]),
  )


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [''.join(f'<td>{text(cell)}</td>' for cell in row) for row in rows]
  top = ''.join(f'<th>{text(cell)}</th>' for cell in head)
  body = ''.join(f'<tr>{line}</tr>' for line in lines)
  return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _reach(reach: Reach) -> str:
  at = LADDER.index(REACH)
  return (
    f'{reach.accessible[at]:.1%}, {reach.undecided[at]:.1%} undecided (95 % interval '
    f'{reach.low[at]:.1%} to {reach.high[at]:.1%})'
  )


def _number(x: float) -> str:
  return f'{x:.4g}' if math.isfinite(x) else '∞'


def _estimate(x: free_energy.Estimate) -> str:
  return f'{x}' if math.isfinite(x.mean) else '∞: it writes what its base never does'


def _ends(curve: Curve) -> str:
  return ', '.join(
    f'{curve.rate[at]:.1%} ({curve.low[at]:.1%} to {curve.high[at]:.1%}) at k = '
    f'{curve.k[at]:,}'
    for at in sorted({0, len(curve.k) - 1})
  )


def _ratio(x) -> str:
  return '–' if math.isnan(x.value) else f'{x.value:.2f} ({x.low:.2f} to {x.high:.2f})'
