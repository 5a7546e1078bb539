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
  page_markup,
  report_figures,
  transcript_page,
  verdict,
)
from educe.measurement.findings import DELTA, Findings
from educe.measurement.pass_at_k import Curve
from educe.measurement.table import Side, Table

PAGE, FINDINGS = 'report.html', 'findings.json'
EXAMPLES, EACH = 5, 2  # prompts of a kind, completions of each side

STYLE = """
header { position: static; }
figure { margin: 12px 0 4px; }
figure img { width: 100%; height: auto; border-radius: 8px; background: #fff; }
figcaption, .note { color: var(--soft); font-size: 15px; }
.sentence { font-size: 18px; margin: 10px 0; }
main h2 { font-size: 19px; color: var(--ink); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { padding: 3px 10px 3px 0; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; }
.close td { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
dt { font-weight: 600; margin-top: 8px; }
dd { margin: 0; color: var(--soft); }
"""

# What each picture shows, for someone who sees it for the first time.
CAPTIONS = {
  'pass_at_k': (
    'How often at least one of k samples is right, averaged over prompts, with 95 % '
    'intervals over prompts. If training only re-weighted what the base could do, the '
    'policy is ahead at small k and never behind at large k. Dashed: the base made surer '
    'of itself without training. Dotted: its majority vote.'
  ),
  'gains': (
    'The gain in the share of right samples, split by what the base could already do '
    'when given k samples. Blue: prompts that k samples of the base solve almost surely. '
    'Orange: prompts that they do not. Grey: the samples at hand cannot tell.'
  ),
  'prompts': 'Each point is a prompt. Above the line it was gained, below it was lost.',
  'support': (
    'Of the prompts that k samples of the base solve, the share that k samples of the '
    'policy solve too; and of those that the policy solves, the share that is new. '
    'Dashed: the same if the base is compared with itself, which is what chance does.'
  ),
  'ledger': (
    'How far the policy went from its base, and for what. Being right more often has a '
    'least price; giving fewer of the right answers than before, and changes that no '
    'reward asked for, come on top.'
  ),
  'frontier': (
    'The line is the best that any policy can do at that distance from the base. A '
    'policy on it has only re-weighted the base by the reward.'
  ),
}

GLOSSARY = {
  'base, policy': 'the model before, and the model after, the training in question',
  'right': 'a sample to which the verifier gives a reward of 1 or more',
  'elicited': (
    'gained on prompts that the base itself solves within the budget of samples: what '
    'was there was drawn out'
  ),
  'created': 'gained on prompts that it does not solve within that budget',
  'budget': (
    f'a number of samples k: a prompt is within it if k samples of the base show a right '
    f'answer with a chance of {DELTA:.0%}'
  ),
  'nat': 'a factor of e = 2.718 in probability; KL is the mean number of nats between the '
  'probabilities that policy and base give to what the policy writes',
  'interval': '95 %, over prompts: what other prompts of this kind may well have shown',
}


class Report(NamedTuple):
  findings: Findings
  verdict: verdict.Verdict
  page: pathlib.Path
  picture: pathlib.Path


def write(table: Table, folder: pathlib.Path, *, budget: int | None = None) -> Report:
  """Measures the table and writes all of it into `folder`.

  budget: k of the verdict, samples; None: what half of the samples can deny

  Raises ValueError as `findings.of_table`.
  """
  found = findings.of_table(table, budget=budget)
  said = verdict.judge(found)
  title = f'{said.word}: {name(table, "policy")} from {name(table, "base")}'
  picture = report_figures.draw(found, folder, title=title)
  paths.write(
    folder / FINDINGS,
    json.dumps({'verdict': plain(said), **plain(found)}, indent=1) + '\n',
  )
  images = {key: (folder / f'{key}.png').read_bytes() for key in report_figures.PANELS}
  page = page_markup.PAGE.substitute(
    name=html.escape(title),
    title=transcript_page.text(said.word),
    style=page_markup.STYLE + STYLE,
    script=page_markup.SCRIPT,
    counts=_facts(table, found),
    legend='',
    groups='\n'.join(_sections(table, found, said, images)),
  )
  paths.write(folder / PAGE, page)
  return Report(found, said, folder / PAGE, picture)


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
    f'policy <b>{_text(name(table, "policy"))}</b>',
    f'base <b>{_text(name(table, "base"))}</b>',
    f'<b>{len(found.rates)}</b> prompts × <b>{found.samples}</b> samples of each',
  ]
  if environment:
    facts.append('on ' + _text(_environment(environment)))
  if decoding:
    facts.append(
      f'temperature {decoding["temperature"]}, at most {decoding["max_new_tokens"]} tokens'
    )
  if found.left_out:
    facts.append(f'{found.left_out} prompts left out: never scored')
  return '\n'.join(f'<li>{fact}</li>' for fact in facts)


def _environment(section: dict[str, Any]) -> str:
  parts = [str(section.get('task') or section.get('name'))]
  parts += [str(section[key]) for key in ('part',) if section.get(key)]
  return ', '.join(parts)


def _sections(table: Table, found: Findings, said: verdict.Verdict, images):
  yield f'<section><p class="sentence">{_text(said.sentence)}</p>'
  points = ''.join(f'<li>{_text(line)}</li>' for line in said.evidence)
  yield f'<ul>{points}</ul></section>'
  for key, (heading, _) in report_figures.PANELS.items():
    data = base64.b64encode(images[key]).decode()
    yield (
      f'<section><figure><img alt="{_text(heading)}" src="data:image/png;base64,{data}">'
      f'<figcaption>{_text(CAPTIONS[key])}</figcaption></figure></section>'
    )
  yield _numbers(found)
  yield _others(found)
  gains = found.rates[:, 1] - found.rates[:, 0]
  order = np.argsort(-gains, kind='stable')
  rows = {row: at for at, row in enumerate(table.ids)}
  for heading, chosen in (
    ('Gained most', [i for i in order if gains[i] > 0]),
    ('Lost most', [i for i in order[::-1] if gains[i] < 0]),
  ):
    yield f'<section><h2>{heading}</h2>'
    if not chosen:
      yield '<p class="note">no prompt</p>'
    for index in chosen[:EXAMPLES]:
      yield _example(table, rows[found.ids[index]], found.rates[index])
    yield '</section>'
  terms = ''.join(
    f'<dt>{_text(x)}</dt><dd>{_text(y)}</dd>' for x, y in GLOSSARY.items()
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
    ('KL, mean of log-ratios, nats a sequence', f'{found.divergence.per_sequence}'),
    ('the same, nats a token', f'{per_token.mean:.4f}'),
    ('KL to the nearest Gibbs policy, nats', f'{spent.distance}'),
    ('its temperature β, in rewards', f'{spent.beta:.3g}'),
    ('E r − β·KL of the policy, and the most there is at that β',
     f'{spent.objective:.4f} and {spent.soft_value:.4f}'),
    ('largest probability ratio to the base', f'e^{found.log_ratio:.2f}'),
    ('accessible to the base', f'{found.reach}'),
    ('right answers kept of those the base shows', f'{found.outputs}'),
  ]  # fmt: skip
  if found.missing is not None:
    rows.append(('texts of the base not yet seen', f'{found.missing}'))
  if found.nulls is not None:
    nulls = found.nulls
    exponent = f'p^{nulls.power.alpha:.3g}'
    rows.append((f'the base sharpened, {exponent}', _ends(nulls.power.curve)))
    rows.append(('the policy against that', f'{nulls.over_power}'))
    if nulls.majority is not None:
      rows.append(('majority vote of the base', _ends(nulls.majority)))
    rows.append(
      (
        f'best of {nulls.n:.2g} samples of the base by the verifier, as many tokens as one '
        'of the policy',
        f'{nulls.best_of}',
      )
    )
  return f'<section><h2>More numbers</h2>{_grid(("", ""), rows)}</section>'


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
  lines = [''.join(f'<td>{_text(cell)}</td>' for cell in row) for row in rows]
  top = ''.join(f'<th>{_text(cell)}</th>' for cell in head)
  body = ''.join(f'<tr>{line}</tr>' for line in lines)
  return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _ends(curve: Curve) -> str:
  return ', '.join(
    f'{curve.rate[at]:.1%} ({curve.low[at]:.1%} to {curve.high[at]:.1%}) at k = '
    f'{curve.k[at]:,}'
    for at in sorted({0, len(curve.k) - 1})
  )


def _ratio(x) -> str:
  return '–' if math.isnan(x.value) else f'{x.value:.2f} ({x.low:.2f} to {x.high:.2f})'


def _text(value: Any) -> str:
  return transcript_page.text(value)
