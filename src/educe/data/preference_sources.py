"""Public preference data as records for data/pairs.py, each a function for config.source.

  config.source = dict(name='educe.data.preference_sources:pandalm')

  hh_rlhf          pairs       human choices between an assistant's last turns (harmless)
  pandalm          pairs       three human votes on two models' answers, with ratings
  llmbar           pairs       adversarial pairs that test who judges
  gsm8k_solutions  unpaired    models' worked solutions, labelled by their final answer

Data whose columns have the right names, or need others, are read by sources.jsonl:

  dict(name='jsonl', path='data://dpo_demo.jsonl.gz', columns=dict(prompt='conversations'))
  dict(name='jsonl', path='data://kto_demo.jsonl.gz')

`split`, `columns` (of the records made here) and `system` are those of sources.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from educe.data.sources import Source, jsonl
from educe.progress import say

Record = dict[str, Any]

WARNING = (
  'HH-RLHF, in the words of its publisher: "The data contain content that may be offensive '
  'or upsetting. Topics include, but are not limited to, discriminatory language and '
  'discussions of abuse, violence, self-harm, exploitation, and other potentially '
  'upsetting subject matter. Please only engage with the data in accordance with your own '
  'personal risk tolerance. The data are intended for research purposes, especially '
  'research that can make models less harmful."'
)


def hh_rlhf(
  *,
  path: str = 'data://hh_rlhf_harmless_test.jsonl.gz',
  split: str | None = None,
  columns: Mapping[str, str] | None = None,
  system: str | None = None,
) -> Source:
  """Anthropic's harmlessness preferences; `prompt`, `chosen`, `rejected` as messages.

  Yuntao Bai et al., "Training a helpful and harmless assistant with reinforcement
  learning from human feedback", 2022, arXiv:2204.05862.

  Content warning: WARNING, printed whenever the data are read
  (github.com/anthropics/hh-rlhf). They are for preference models, not for imitation: both
  sides of a pair may be harmful.

  Of the 2,312 test pairs 2,308 remain: in four the chosen answer is empty. Turns that
  follow one another from the same speaker (in nine) are joined by an empty line.
  """
  say(WARNING)

  def convert(row: Record) -> Iterable[Record]:
    sides = [_dialogue(row[name]) for name in ('chosen', 'rejected')]
    opening = sides[0][:-1]
    if system is not None:
      opening = [{'role': 'system', 'content': system}, *opening]
    if all(side[-1]['content'] for side in sides):
      same = sides[0][:-1] == sides[1][:-1]
      # Where the prompts differ, pairs.py says so with the record's name.
      said = [side[-1:] if same else side for side in sides]
      yield {'prompt': opening, 'chosen': said[0], 'rejected': said[1]}

  return _converted(jsonl(path=path, split=split), convert, columns)


def _dialogue(text: str) -> list[Record]:
  """'\\n\\nHuman: …\\n\\nAssistant: …' as messages."""
  pieces = re.split(r'\n\n(Human|Assistant):', text)
  messages: list[Record] = []
  for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
    role = {'Human': 'user', 'Assistant': 'assistant'}[speaker]
    if messages and messages[-1]['role'] == role:
      joined = [messages[-1]['content'], said.strip()]
      messages[-1]['content'] = '\n\n'.join(filter(None, joined))
    else:
      messages.append({'role': role, 'content': said.strip()})
  return messages


def pandalm(
  *,
  path: str = 'data://pandalm_test.jsonl.gz',
  split: str | None = None,
  columns: Mapping[str, str] | None = None,
  chat: bool = True,
  system: str | None = None,
) -> Source:
  """Answers of two models to an instruction, and what three people thought of them.

  Yidong Wang et al., "PandaLM", 2024, arXiv:2306.05087. The majority's choice is
  `chosen`. A rating is the share of the votes, a vote for a tie being half a vote for
  each side, so that the margin is 1 where all agree and 1/3 where one disagrees. Of the
  999 pairs, the 105 that the majority calls a tie are left out, and so are those with an
  empty answer: 842 remain.
  """

  def convert(row: Record) -> Iterable[Record]:
    votes = Counter(row[f'annotator{i}'] for i in (1, 2, 3))
    best, count = votes.most_common(1)[0]
    if best == 0 or count < 2:
      return
    share = {side: (votes[side] + votes[0] / 2) / 3 for side in (1, 2)}
    # A statement's answer was read as JSON's true, where the text was True.
    said = {side: row[f'response{side}'] for side in (1, 2)}
    answers = {side: '' if x is None else str(x) for side, x in said.items()}
    if all(answer.strip() for answer in answers.values()):
      yield {
        'prompt': '\n\n'.join(filter(None, [row['instruction'], row['input']])),
        'chosen': answers[best],
        'rejected': answers[3 - best],
        'chosen_rating': share[best],
        'rejected_rating': share[3 - best],
        'models': row['cmp_key'],
      }

  return _converted(jsonl(path=path, split=split), convert, columns, chat, system)


def llmbar(
  *,
  path: str = 'data://llmbar.jsonl.gz',
  split: str | None = None,
  columns: Mapping[str, str] | None = None,
  chat: bool = True,
  system: str | None = None,
) -> Source:
  """419 pairs whose right choice is objective; `subset` is Natural or Adversarial/….

  Zhiyuan Zeng et al., "Evaluating large language models at evaluating instruction
  following", 2024, arXiv:2310.07641. For testing judges and reward models; the adversarial
  wrong answer is the more polished one.
  """

  def convert(row: Record) -> Iterable[Record]:
    best = row['label']
    yield {
      'prompt': row['input'],
      'chosen': row[f'output_{best}'],
      'rejected': row[f'output_{3 - best}'],
      'subset': row['subset'],
    }

  return _converted(jsonl(path=path, split=split), convert, columns, chat, system)


def gsm8k_solutions(
  *,
  path: str = 'data://gsm8k_model_solutions.jsonl.gz',
  split: str | None = None,
  columns: Mapping[str, str] | None = None,
  chat: bool = True,
  system: str | None = None,
) -> Source:
  """Four models' solutions of each test question; `label`: the final answer is right.

  Karl Cobbe et al., "Training verifiers to solve math word problems", 2021,
  arXiv:2110.14168. 5,276 solutions of 1,319 questions, 2,001 of them right. Only the
  outcome is labelled: the data know of no step whether it is right. `split` cuts between
  questions. To train a verifier: columns=dict(rating='label') and records='rated'.
  """

  def convert(row: Record) -> Iterable[Record]:
    for model, attempt in row.items():
      if isinstance(attempt, Mapping):
        yield {
          'prompt': row['question'],
          'completion': attempt['solution'],
          'label': attempt['is_correct'],
          'model': model,
        }

  return _converted(jsonl(path=path, split=split), convert, columns, chat, system)


def _converted(
  source: Source,
  convert: Callable[[Record], Iterable[Record]],
  columns: Mapping[str, str] | None,
  chat: bool = False,
  system: str | None = None,
) -> Source:
  """Each row of a file as the records that it makes; raises ValueError naming its line."""
  records: list[Record] = []
  for index in range(len(source)):
    try:
      records += convert(source[index])
    except (KeyError, TypeError, IndexError) as error:
      raise ValueError(
        f'{source.where(index)}: not a record of this data set ({error!r})'
      ) from None
  return Source(records, source.name, columns, chat, system, source.fingerprint)
