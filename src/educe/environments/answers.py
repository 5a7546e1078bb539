"""The answer in a completion, and the number in an answer.

Shared by the environments, so that all of them agree on what earns a reward:

- Only what follows </think> counts. Thinking that is never closed leaves nothing, an
  answer inside it earns nothing, and neither does <think></think> by itself.
- The last marked answer counts, and it may hold braces: \\boxed{\\frac{1}{2}}. One that
  is left open, as where the completion was cut off, is no answer, and no earlier one
  stands in for it.

Everything here is regular expressions without nested repetition and one scan: linear in
the text, whatever the text. Nothing is evaluated.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r'(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\d.])\.\d+'
_CURRENCY = r'(?:\\?\$|[€£¥])'
# A minus after a word, a number or a bracket subtracts; elsewhere it is a sign.
_NUMBER = re.compile(
  rf'(?:(?<![\w)])-\s?{_CURRENCY}?)?(?<!\d)(?:{_DIGITS})(?!\d)', re.ASCII
)
_PLAIN = re.compile(rf'-?(?:{_DIGITS})', re.ASCII)
_PREFIX = re.compile(r'^(?:the )?(?:final )?answer(?: is|:)\s*:?\s*', re.IGNORECASE)
_TAGGED = re.compile(r'<answer>((?:(?!<answer>).)*?)</answer>', re.DOTALL)
_DECORATION = re.compile(
  rf'{_CURRENCY}|\\?%|\\[,;:! ]|~|\\(?:text|mathrm|textbf|mbox)\{{([^{{}}]*)\}}'
)
_VALUE = re.compile(
  rf'([+-]?)\s*({_DIGITS})\.?(?:\s*/\s*(\d+))?((?:\s+[^\W\d_]+\.?)*)', re.ASCII
)
_FRACTION = re.compile(
  r'([+-]?)\s*\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}', re.ASCII
)
# Words that are more than a unit: '3 million' is not 3.
_SCALES = re.compile(
  r'\b(?:hundred|thousand|million|billion|trillion|dozen|half|halves|third|quarter'
  r'|and|or|plus|minus|times|over|to|per cent of)s?\b',
  re.IGNORECASE,
)


def visible(text: str) -> str | None:
  """What stands outside the thinking, or None if thinking was never closed."""
  if '<think>' not in text and '</think>' not in text:
    return text
  _, closed, rest = text.rpartition('</think>')
  return None if not closed or '<think>' in rest else rest


def boxed(text: str) -> str | None:
  """Content of the last \\boxed{…}, braces balanced; '' if left open, None if none."""
  start = text.rfind('\\boxed{')
  if start < 0:
    return None
  start += len('\\boxed{')
  depth, at = 1, start
  while at < len(text):
    if text[at] == '\\':  # an escaped brace is a character
      at += 1
    elif text[at] == '{':
      depth += 1
    elif text[at] == '}':
      depth -= 1
      if not depth:
        return text[start:at].strip()
    at += 1
  return ''


def tagged(text: str) -> str | None:
  """Content of the last <answer>…</answer>, or None."""
  found = _TAGGED.findall(text)
  return found[-1].strip() if found else None


def last_number(text: str) -> str | None:
  """The last number, as -1234.5: no separators, currency or plus sign; or None."""
  found = _NUMBER.findall(text.replace('−', '-'))
  return re.sub(r'[^\d.-]', '', found[-1]) if found else None


def last_line(text: str) -> str | None:
  """The last line that is not blank, without 'The answer is' before it; or None."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return _PREFIX.sub('', lines[-1]) or None if lines else None


def extract(text: str, reference: str | None) -> str | None:
  """The answer in a completion, or None. The first of these rules that applies:

  1. the last <answer>…</answer>
  2. the last \\boxed{…}
  3. if the reference is a number: the last number (thousands separators and currency
     dropped, and '.0' if the reference is whole)
  4. if the reference has several lines: the whole text
  5. the last line that is not blank, without 'Answer:' or 'The answer is' before it or
     a full stop after it

  Only `visible` text counts.
  """
  seen = visible(text)
  if seen is None:
    return None
  for marked in (tagged(seen), boxed(seen)):
    if marked is not None:
      return marked or None
  reference = reference or ''
  if _PLAIN.fullmatch(reference):
    found = last_number(seen)
    return re.sub(r'\.0+$', '', found) if found and '.' not in reference else found
  if '\n' in reference:
    return seen.strip('\n') or None
  line = last_line(seen)
  if line is None or reference.endswith('.'):
    return line
  return line.removesuffix('.') or None


def number(text: str) -> Fraction | None:
  """The exact value of a text that is one number, or None.

  Currency, LaTeX spacing and units ('18 dollars', '\\text{ km}') are dropped, and so is
  a percent sign: it is the unit of what was asked for in per cent, as the references of
  GSM8K and MATH leave it out. So '50%' is 50 and never 0.5. Fractions ('1/2',
  '\\frac{1}{2}') and separators ('1,234', '1{,}234') are read; '1,23' is no number.
  """
  if len(text) > 200:
    return None
  text = text.replace('−', '-').replace('{,}', ',').strip().strip('$').strip()
  text = _DECORATION.sub(lambda match: f' {match[1]}' if match[1] else '', text).strip()
  text = text.removesuffix('.')
  if match := _FRACTION.fullmatch(text):
    sign, top, bottom = match.groups()
  elif (match := _VALUE.fullmatch(text)) and not _SCALES.search(match[4]):
    sign, top, bottom = match[1], match[2].replace(',', ''), match[3] or '1'
    # A single letter is a variable as often as a unit: '2 x' is not 2.
    if any(len(word) == 1 and word not in 'gmshLl' for word in match[4].split()):
      return None
  else:
    return None
  if int(bottom) == 0:
    return None
  value = Fraction(top) / int(bottom)
  return -value if sign == '-' else value
