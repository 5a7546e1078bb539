"""Text to token ids and back, one type for every source of a vocabulary.

  load(path='folder')        Hugging Face: tokenizer.json (+ its config, chat template)
  load(path='model.gguf')    the vocabulary inside a GGUF file
  load(path='tok512.bin')    llama2.c: scored pieces with byte fallback
  load(path='byte')          256 bytes and five special tokens; needs no file
  load(path='characters:01+=')  a token for each of these and one for the end: the
                             vocabulary of a world small enough to train from nothing

Whatever the source, the rules are held as a Hugging Face `tokenizer.json` and run by
the `tokenizers` library, so offsets, saving and pickling work the same for all. The
readers of foreign formats are in `vocabularies.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from educe import paths
from educe.data import vocabularies

# Tokenisation runs inside data workers: threads there only fight each other.
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Rules of tokenisation and the ids that mean something. Picklable.

  No method adds a special token by itself; who needs BOS or EOS writes it.

  Special tokens *written in the text* are recognised: '<|im_end|>' in a user's
  message ends the turn. Chat templates need that; text from people who might abuse it
  (tool output, web pages) can be encoded with `special=False`.
  """

  definition: str  # the text of tokenizer.json
  bos_id: int | None
  eos_ids: tuple[int, ...]  # every id that ends a generation; the first is written
  pad_id: int  # may equal an EOS id: masks go by position, never by id
  chat_template: str | None
  add_bos: bool  # whether plain text (not chats) starts with BOS

  def encode(self, text: str, *, special: bool = True) -> list[int]:
    """Ids of `text`. special=False: special tokens in it are ordinary characters."""
    return self.encode_with_offsets(text, special=special)[0]

  def encode_with_offsets(
    self, text: str, *, special: bool = True
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids, and for each the characters [start, end) of `text` it comes from.

    Pieces of one character (byte fallback) all carry that character's span.
    """
    try:
      encoding = self._backend(special).encode(text, add_special_tokens=False)
    except TypeError:  # half a surrogate pair, as a broken \ud800 escape leaves
      raise ValueError(f'text is not valid Unicode: {text[:60]!r}') from None
    except Exception:  # the library's own, of a vocabulary of characters
      raise ValueError(
        f'text has characters that the vocabulary lacks: {text[:60]!r}'
      ) from None
    return encoding.ids, encoding.offsets

  def decode(
    self,
    ids: Sequence[int],
    *,
    skip_special: bool = False,
    continuation: bool = False,
  ) -> str:
    """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

    skip_special: leave out BOS, EOS and the like.
    continuation: `ids` continue a text. Vocabularies that put a space before the text
      (llama2.c, Llama 2) drop it here only if this is False.
    """
    left_out = self.special_ids if skip_special else ()
    data = b''.join([self.token_bytes(int(i)) for i in ids if i not in left_out])
    if self._dummy_prefix and not continuation:
      data = data.removeprefix(b' ')
    return data.decode('utf-8', errors='replace')

  def token_bytes(self, token: int) -> bytes:
    """The exact bytes of one token. Many tokens are not UTF-8 by themselves.

    An id beyond the vocabulary has none: embeddings are often padded with such rows,
    and a model may well sample one.
    """
    return self._bytes[token] if token < len(self._bytes) else b''

  @functools.cached_property
  def vocab_size(self) -> int:
    """Largest id + 1."""
    return 1 + max(self._backend(True).get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    added = self._backend(True).get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes what `load`, and Hugging Face's AutoTokenizer, read back."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = self._backend(True).id_to_token
    config: dict[str, Any] = dict(
      tokenizer_class='PreTrainedTokenizerFast',
      clean_up_tokenization_spaces=False,
      add_bos_token=self.add_bos,
      bos_token=None if self.bos_id is None else name(self.bos_id),
      eos_token=name(self.eos_ids[0]),
      pad_token=name(self.pad_id),
    )
    generation: dict[str, Any] = dict(
      bos_token_id=self.bos_id,
      eos_token_id=list(self.eos_ids),
      pad_token_id=self.pad_id,
    )
    files = {
      'tokenizer.json': self.definition,
      'tokenizer_config.json': json.dumps(config, indent=2, ensure_ascii=False),
      'generation_config.json': json.dumps(generation, indent=2),
    }
    if self.chat_template is not None:
      files['chat_template.jinja'] = self.chat_template
    for file, text in files.items():
      # newline='': a template's '\n' is part of the tokens that it makes.
      (folder / file).write_text(text, encoding='utf-8', newline='')

  def _backend(self, special: bool) -> tokenizers.Tokenizer:
    return self._special if special else self._literal

  @functools.cached_property
  def _special(self) -> tokenizers.Tokenizer:
    definition = json.loads(self.definition)
    # The post-processor would add special tokens and trim spaces off the offsets;
    # truncation and padding saved in the file would change what is encoded.
    definition.update(post_processor=None, truncation=None, padding=None)
    return tokenizers.Tokenizer.from_str(json.dumps(definition))

  @functools.cached_property
  def _literal(self) -> tokenizers.Tokenizer:
    literal = tokenizers.Tokenizer.from_str(self._special.to_str())
    literal.encode_special_tokens = True
    return literal

  @functools.cached_property
  def _bytes(self) -> list[bytes]:
    return vocabularies.byte_table(self._special)

  @functools.cached_property
  def _dummy_prefix(self) -> bool:
    ids = self._special.encode('a', add_special_tokens=False).ids
    return b''.join(self._bytes[i] for i in ids).startswith(b' ')

  def __getstate__(self) -> dict[str, Any]:
    """Fields only: each process builds its own backend."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def load(*, path: str) -> Tokenizer:
  """A tokenizer from a folder, a .gguf or llama2.c .bin file, 'byte' or 'characters:…'.

  path: see `educe.paths` for package:// and data://
  Raises FileNotFoundError, or ValueError naming what the file lacks.
  """
  if path == 'byte':
    return Tokenizer(**vocabularies.byte())
  if path.startswith('characters:'):
    return Tokenizer(**vocabularies.characters(path.removeprefix('characters:')))
  found = paths.resolve(path)
  if found.is_dir():
    return Tokenizer(**vocabularies.hugging_face(found))
  if found.suffix == '.gguf':
    return Tokenizer(**vocabularies.gguf(found))
  if found.suffix == '.bin':
    return Tokenizer(**vocabularies.llama2c(found))
  raise ValueError(
    f'tokenizer path={path!r}: expected a folder with tokenizer.json, a .gguf file, '
    "a llama2.c .bin file, the word 'byte', or 'characters:' and an alphabet"
  )
