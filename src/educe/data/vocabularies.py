"""Readers of foreign vocabularies: each returns the fields of a `Tokenizer`.

Sources: GGUF metadata keys as in the ggml specification; the pre-tokenizer called
`smollm` as in llama.cpp; llama2.c's tokenizer.bin as written by its tokenizer.py and
read by run.c (Karpathy, 2023); the byte alphabet of GPT-2 (Radford et al., 2019).
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import struct
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

BYTE_TEMPLATE = (
  '{{ bos_token }}{% for message in messages %}'
  "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
  '{% endfor %}{% if add_generation_prompt %}'
  "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@functools.cache
def byte_alphabet() -> dict[int, str]:
  """GPT-2's printable character for each byte: itself, or U+0100 onwards."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [b for b in range(256) if b not in printable]
  table = {b: chr(b) for b in printable}
  return table | {b: chr(256 + i) for i, b in enumerate(rest)}


def byte_table(backend: tokenizers.Tokenizer) -> list[bytes]:
  """The bytes of every id, b'' for ids that the vocabulary skips.

  Raises ValueError for a vocabulary that does not know its own bytes (WordPiece).
  """
  decoder = json.dumps(json.loads(backend.to_str())['decoder'])
  if '"ByteLevel"' in decoder:
    inverse = {c: b for b, c in byte_alphabet().items()}

    def content(token: str) -> bytes:
      return bytes(inverse[c] for c in token)

  elif '"ByteFallback"' in decoder:

    def content(token: str) -> bytes:
      if re.fullmatch('<0x[0-9A-F]{2}>', token):
        return bytes([int(token[3:5], 16)])
      return token.replace('▁', ' ').encode()

  else:
    raise ValueError(
      'tokenizer.json: only byte-level and byte-fallback vocabularies are supported, '
      f'because others cannot say which bytes a token stands for (decoder: {decoder})'
    )
  vocabulary = backend.get_vocab(with_added_tokens=True)
  added = backend.get_added_tokens_decoder()
  table = [b''] * (1 + max(vocabulary.values()))
  for token, i in vocabulary.items():
    table[i] = added[i].content.encode() if i in added else content(token)
  return table


def byte() -> dict[str, Any]:
  """Id b is byte b; 256.. are special. Chats are in ChatML."""
  special = ['<|pad|>', '<|bos|>', '<|eos|>', '<|im_start|>', '<|im_end|>']
  backend = tokenizers.Tokenizer(
    models.BPE(vocab={c: b for b, c in byte_alphabet().items()}, merges=[])
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([_special(s) for s in special])
  return dict(
    definition=_with_bos(backend, '<|bos|>', 257),
    bos_id=257,
    eos_ids=(258, 260),
    pad_id=256,
    chat_template=BYTE_TEMPLATE,
    add_bos=True,
  )


def characters(alphabet: str) -> dict[str, Any]:
  """Id i is the i-th character; one more, <|end|>, ends a text and pads.

  Raises ValueError unless the characters are different and printable ASCII.
  """
  if not alphabet or len({*alphabet}) < len(alphabet):
    raise ValueError(
      f'characters:{alphabet} must name different characters, at least 1'
    )
  if not (alphabet.isascii() and alphabet.isprintable()):
    raise ValueError(f'characters:{alphabet!r} must be printable ASCII')
  names = [byte_alphabet()[ord(c)] for c in alphabet]
  # Words rather than pieces: a character outside the alphabet is an error, not dropped.
  backend = tokenizers.Tokenizer(
    models.WordLevel({name: i for i, name in enumerate(names)}, unk_token='<|unknown|>')
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      pre_tokenizers.Split(tokenizers.Regex('.'), 'isolated'),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([_special('<|end|>')])
  end = len(alphabet)
  return dict(
    definition=backend.to_str(),
    bos_id=None,
    eos_ids=(end,),
    pad_id=end,
    chat_template=None,
    add_bos=False,
  )


def llama2c(path: pathlib.Path) -> dict[str, Any]:
  """llama2.c's tokenizer.bin: a longest-piece int32, then (float32 score, int32
  length, bytes) for each piece. Ids 0, 1, 2 are unk, bos, eos; 3..258 are bytes.

  The algorithm (run.c): a space before the text, code points (bytes where there is no
  such piece), then the best-scoring adjacent pair is merged until none is left.
  """
  data = path.read_bytes()
  pieces: list[str] = []
  scores: list[float] = []
  try:
    (longest,) = struct.unpack_from('<i', data, 0)
    at = 4
    while at < len(data):
      score, length = struct.unpack_from('<fi', data, at)
      if not 0 < length <= longest or at + 8 + length > len(data):
        raise ValueError(f'piece {len(pieces)} has length {length}')
      pieces.append(data[at + 8 : at + 8 + length].decode('utf-8'))
      scores.append(score)
      at += 8 + length
    if pieces[3:259] != [f'<0x{b:02X}>' for b in range(256)]:
      raise ValueError('pieces 3..258 are not the 256 bytes')
  except (struct.error, ValueError) as error:
    raise ValueError(f'{path}: not a llama2.c tokenizer file ({error})') from None
  # unk, bos, eos are stored as '<unk>', '\n<s>\n', '\n</s>\n': for printing, not names.
  pieces[:3] = ['<unk>', '<s>', '</s>']
  vocabulary = {piece: i for i, piece in enumerate(pieces)}
  merges = [
    (-scores[i], piece[:cut], piece[cut:])
    for i, piece in enumerate(pieces[259:], 259)
    for cut in range(1, len(piece))
    if piece[:cut] in vocabulary and piece[cut:] in vocabulary
  ]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=[(left, right) for _, left, right in sorted(merges, key=lambda m: m[0])],
      unk_token='<unk>',
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  backend.normalizer = normalizers.Prepend(' ')
  backend.decoder = decoders.Sequence(
    [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  )
  backend.add_special_tokens([_special(s) for s in pieces[:3]])
  return dict(
    definition=_with_bos(backend, '<s>', 1),
    bos_id=1,
    # The TinyStories models were trained with BOS between stories and no EOS, so
    # a story ends where either appears.
    eos_ids=(2, 1),
    pad_id=0,
    chat_template=None,
    add_bos=True,
  )


def gguf(path: pathlib.Path) -> dict[str, Any]:
  """The tokenizer in a GGUF file's metadata (byte-level BPE: `gpt2`)."""
  # Imported here: data pipelines on other vocabularies work without it.
  import gguf as gguf_library

  try:
    fields = gguf_library.GGUFReader(str(path)).fields
  except (ValueError, IndexError, KeyError, OSError) as error:
    raise ValueError(
      f'{path}: the GGUF file is truncated or damaged ({error}); fetch it again'
    ) from None

  def get(key: str, default: Any = None) -> Any:
    field = fields.get(f'tokenizer.{key}')
    return default if field is None else field.contents()

  if get('ggml.model') != 'gpt2':
    raise ValueError(
      f'{path}: tokenizer.ggml.model={get("ggml.model")!r} is not supported '
      "(expected 'gpt2', byte-level BPE); load the model's Hugging Face folder instead"
    )
  pre = get('ggml.pre', 'default')
  splits: dict[str, list[Any]] = {
    'gpt-2': [],
    # llama.cpp's `smollm`: each digit by itself before GPT-2's own split.
    'smollm': [pre_tokenizers.Digits(individual_digits=True)],
  }
  if pre not in splits:
    raise ValueError(
      f'{path}: tokenizer.ggml.pre={pre!r} is not supported (one of {sorted(splits)}); '
      "load the model's Hugging Face folder instead"
    )
  tokens = get('ggml.tokens')
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(merge.split(' ', 1)) for merge in get('ggml.merges')],
    )
  )
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*splits[pre], byte_level])
  backend.decoder = decoders.ByteLevel()
  kinds = get('ggml.token_type', [1] * len(tokens))
  # 3: control tokens, 4: user-defined ones (matched whole, but not special).
  backend.add_special_tokens(
    [_special(token) for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
  )
  backend.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind == 4
    ]
  )
  eos = [get('ggml.eos_token_id'), get('ggml.eot_token_id'), get('ggml.eom_token_id')]
  eos_ids = tuple(dict.fromkeys(int(i) for i in eos if i is not None))
  if not eos_ids:
    raise ValueError(f'{path}: no tokenizer.ggml.eos_token_id')
  bos_id = get('ggml.bos_token_id')
  add_bos = bos_id is not None and bool(get('ggml.add_bos_token', False))
  return dict(
    definition=_with_bos(backend, tokens[bos_id], bos_id)
    if add_bos
    else backend.to_str(),
    bos_id=bos_id,
    eos_ids=eos_ids,
    pad_id=get('ggml.padding_token_id', eos_ids[0]),
    chat_template=get('chat_template'),
    add_bos=add_bos,
  )


def hugging_face(folder: pathlib.Path) -> dict[str, Any]:
  """A folder with tokenizer.json; its config, generation config and template too."""
  if not (folder / 'tokenizer.json').exists():
    raise FileNotFoundError(f'{folder}: no tokenizer.json in it')
  definition = (folder / 'tokenizer.json').read_text(encoding='utf-8')
  try:
    backend = tokenizers.Tokenizer.from_str(definition)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f'{folder}/tokenizer.json: {error}') from None
  config = _json(folder / 'tokenizer_config.json')
  generation = _json(folder / 'generation_config.json')

  def special_id(name: str) -> int | None:
    token = config.get(name)
    token = token['content'] if isinstance(token, dict) else token
    if token is None:
      return None
    found = backend.token_to_id(token)
    if found is None:
      raise ValueError(
        f'{folder}/tokenizer_config.json: {name}={token!r} is not in the vocabulary'
      )
    return found

  bos_id, eos_id, pad_id = map(special_id, ('bos_token', 'eos_token', 'pad_token'))
  more = generation.get('eos_token_id') or []
  more = more if isinstance(more, list) else [more]
  eos_ids = tuple(dict.fromkeys(i for i in [eos_id, *more] if i is not None))
  if not eos_ids:
    raise ValueError(
      f'{folder}: neither tokenizer_config.json (eos_token) nor generation_config.json '
      '(eos_token_id) names a stop token; add one'
    )
  # What the rules do beats what the config says of them.
  first = backend.encode('a', add_special_tokens=True).ids[:1]
  return dict(
    definition=definition,
    bos_id=bos_id,
    eos_ids=eos_ids,
    pad_id=eos_ids[0] if pad_id is None else pad_id,
    chat_template=_template(folder, config),
    add_bos=bos_id is not None and first == [bos_id],
  )


def _template(folder: pathlib.Path, config: dict[str, Any]) -> str | None:
  file = folder / 'chat_template.jinja'
  if file.exists():
    with file.open(encoding='utf-8', newline='') as f:
      return f.read()
  template = config.get('chat_template')
  if isinstance(template, list):  # several, by name
    named = {entry['name']: entry['template'] for entry in template}
    if 'default' not in named:
      raise ValueError(
        f'{folder}/tokenizer_config.json: chat_template has no entry named default '
        f'(there are {sorted(named)})'
      )
    return named['default']
  return template


def _json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path}: not JSON ({error})') from None
  if not isinstance(found, dict):
    raise ValueError(f'{path}: expected an object, got {found!r:.60}; fetch it again')
  return found


def _special(token: str) -> tokenizers.AddedToken:
  return tokenizers.AddedToken(token, normalized=False, special=True)


def _with_bos(backend: tokenizers.Tokenizer, token: str, token_id: int) -> str:
  """tokenizer.json that tells other programs to start texts with BOS."""
  backend.post_processor = processors.TemplateProcessing(
    single=f'{token} $A', special_tokens=[(token, token_id)]
  )
  return backend.to_str()
