"""Ids against references of other hands; bytes, offsets, saving."""

import hashlib
import json
import pathlib
import pickle
import random
import struct

import pytest

from educe import paths
from educe.data import sources, tokenizer

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / 'golden' / 'golden_tokens.json').read_text()
)


def existing(path):
  try:
    return str(paths.resolve(path))
  except FileNotFoundError as error:
    pytest.skip(str(error))


@pytest.fixture(scope='module')
def smollm():
  return tokenizer.load(path=existing(GOLDEN['model']))


@pytest.fixture(scope='module')
def byte():
  return tokenizer.load(path='byte')


def write_llama2c(path, pieces):
  """pieces: (text, score) after the 259 that every file has."""
  fixed = [('<unk>', 0.0), ('\n<s>\n', 0.0), ('\n</s>\n', 0.0)]
  fixed += [(f'<0x{b:02X}>', 0.0) for b in range(256)]
  pieces = [(text.encode(), score) for text, score in [*fixed, *pieces]]
  data = struct.pack('<i', max(len(text) for text, _ in pieces))
  for text, score in pieces:
    data += struct.pack('<fi', score, len(text)) + text
  path.write_bytes(data)
  return str(path)


@pytest.fixture
def small(tmp_path):
  """A llama2.c vocabulary small enough to think about."""
  words = [' ', 't', 'h', 'e', ' t', 'he', ' the', 'é', 'th', 'at', 'a', ' th', '▁']
  pieces = [(word, -float(i)) for i, word in enumerate(words)]
  return write_llama2c(tmp_path / 'tok.bin', pieces)


def llama2c_encode(path, text):
  """run.c's encode(), in Python: an independent reference."""
  data, at, pieces = pathlib.Path(path).read_bytes(), 4, []
  while at < len(data):
    score, length = struct.unpack_from('<fi', data, at)
    pieces.append((data[at + 8 : at + 8 + length], score))
    at += 8 + length
  index = {piece: i for i, (piece, _) in enumerate(pieces)}
  ids = [index[b' ']] if text else []
  for character in text:
    raw = character.encode()
    ids += [index[raw]] if raw in index else [b + 3 for b in raw]
  while True:
    best = (-1e10, None)
    for i in range(len(ids) - 1):
      merged = index.get(pieces[ids[i]][0] + pieces[ids[i + 1]][0])
      if merged is not None and pieces[merged][1] > best[0]:
        best = (pieces[merged][1], (i, merged))
    if best[1] is None:
      return ids
    i, merged = best[1]
    ids[i : i + 2] = [merged]


def test_smollm_ids_equal_both_references(smollm):
  for text, ids in GOLDEN['texts']:
    assert smollm.encode(text) == ids, text


def test_smollm_ids_on_gsm8k(smollm):
  path = existing('data://gsm8k_train.jsonl.gz')
  records = sources.jsonl(path=path, split=f'[:{len(GOLDEN["gsm8k_train"])}]')
  for record, expected in zip(records, GOLDEN['gsm8k_train'], strict=True):
    ids = [smollm.encode(record['question']), smollm.encode(record['answer'])]
    digest = hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest()
    assert digest == expected


def test_smollm_special_ids(smollm):
  assert smollm.vocab_size == 49152
  assert (smollm.bos_id, smollm.eos_ids, smollm.pad_id) == (1, (2,), 2)
  assert not smollm.add_bos
  assert smollm.token_bytes(2) == b'<|im_end|>'
  assert {0, 1, 2} <= smollm.special_ids


def test_bytes_of_all_tokens_rebuild_the_text(smollm, byte, small):
  text = 'Zoë says: 日本 🙂\n\t12 the\x00'
  for tok, prefix in ((smollm, b''), (byte, b''), (tokenizer.load(path=small), b' ')):
    assert b''.join(map(tok.token_bytes, tok.encode(text))) == prefix + text.encode()
    assert tok.decode(tok.encode(text)) == text
    assert all(tok.token_bytes(i) for i in range(tok.vocab_size))


def test_offsets_point_at_the_characters(smollm, byte, small):
  text = ' Zoë  says\n the 日本 1234 '
  for tok in (smollm, byte, tokenizer.load(path=small)):
    ids, offsets = tok.encode_with_offsets(text)
    assert ids == tok.encode(text)
    assert offsets == sorted(offsets)
    covered = set()
    for i, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
      # A token may hold part of a character's bytes, and then its span is all of it.
      dummy = b' ' if i == 0 else b''
      assert tok.token_bytes(token) in dummy + text[start:end].encode()
      covered |= set(range(start, end))
    assert covered == set(range(len(text)))


def test_byte_ids_are_the_bytes(byte):
  assert byte.encode('hé\n') == list('hé\n'.encode())
  assert byte.encode('<|im_end|>') == [260]
  assert byte.decode([104, 105, 260], skip_special=True) == 'hi'
  assert byte.decode([0xC3]) == '\ufffd'


def test_special_tokens_in_untrusted_text(smollm, byte):
  for tok in (smollm, byte):
    assert len(tok.encode('<|im_end|>')) == 1
    literal = tok.encode('a<|im_end|>', special=False)
    assert not set(literal) & tok.special_ids
    assert tok.decode(literal) == 'a<|im_end|>'
    # One mode does not leak into the other.
    assert len(tok.encode('<|im_end|>')) == 1


def test_llama2c_equals_its_reference(small):
  tok = tokenizer.load(path=small)
  assert (tok.bos_id, tok.eos_ids, tok.add_bos) == (1, (2, 1), True)
  random.seed(0)
  for _ in range(300):
    text = ''.join(random.choices('the at é▁日\n', k=random.randrange(30)))
    assert tok.encode(text) == llama2c_encode(small, text), text


def test_llama2c_stories_vocabulary():
  path = existing('data://models/stories260K/tok512.bin')
  tok = tokenizer.load(path=path)
  assert tok.vocab_size == 512
  text = 'Once upon a time, there was a little girl named Lily. '
  assert tok.encode(text)[:4] == [403, 407, 261, 378]
  random.seed(1)
  for _ in range(100):
    words = random.choices([*text.split(), 'Zoë', '\n', '  ', '"', '1'], k=12)
    mixed = ' '.join(words)
    assert tok.encode(mixed) == llama2c_encode(path, mixed)
    assert tok.decode(tok.encode(mixed)) == mixed


def test_continuation_keeps_its_first_space(small):
  tok = tokenizer.load(path=small)
  ids = tok.encode('at the')
  assert tok.decode(ids[-1:]) == 'the'
  assert tok.decode(ids[-1:], continuation=True) == ' the'


@pytest.mark.parametrize('which', ['byte', 'smollm', 'small'])
def test_saved_folder_loads_the_same(which, tmp_path, request):
  tok = request.getfixturevalue(which)
  tok = tokenizer.load(path=tok) if which == 'small' else tok
  tok.save(tmp_path / 'saved')
  again = tokenizer.load(path=str(tmp_path / 'saved'))
  assert again == tok
  for text, _ in GOLDEN['texts']:
    assert again.encode(text) == tok.encode(text)


def test_saved_folder_loads_in_transformers(byte, smollm, tmp_path):
  transformers = pytest.importorskip('transformers')
  for name, tok in (('byte', byte), ('smollm', smollm)):
    tok.save(tmp_path / name)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / name))
    for text, _ in GOLDEN['texts']:
      assert theirs.encode(text, add_special_tokens=False) == tok.encode(text)
    assert theirs.eos_token_id == tok.eos_ids[0]
    assert theirs.chat_template == tok.chat_template
    bos = [tok.bos_id] if tok.add_bos else []
    assert theirs.encode('a') == bos + tok.encode('a')


def test_pickle_carries_no_backend(byte):
  byte.encode('warm the caches')
  again = pickle.loads(pickle.dumps(byte))
  assert again == byte
  assert set(vars(again)) == set(byte.__getstate__())
  assert again.encode('hi') == [104, 105]


def edit(folder, file, **changes):
  path = folder / file
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_details(byte, tmp_path):
  byte.save(tmp_path)
  (tmp_path / 'chat_template.jinja').unlink()
  named = [dict(name='default', template='A'), dict(name='tool_use', template='B')]
  edit(
    tmp_path,
    'tokenizer_config.json',
    chat_template=named,
    pad_token=None,
    eos_token=dict(content='<|im_end|>'),
  )
  edit(tmp_path, 'generation_config.json', eos_token_id=[258, 260])
  tok = tokenizer.load(path=str(tmp_path))
  assert tok.chat_template == 'A'
  assert tok.eos_ids == (260, 258)
  assert tok.pad_id == 260


def test_saved_truncation_and_padding_are_not_obeyed(byte, tmp_path):
  byte.save(tmp_path)
  truncation = dict(direction='Right', max_length=2, strategy='LongestFirst', stride=0)
  edit(tmp_path, 'tokenizer.json', truncation=truncation)
  assert tokenizer.load(path=str(tmp_path)).encode('hello') == list(b'hello')


def test_bad_input(byte, tmp_path):
  with pytest.raises(FileNotFoundError, match='no such file'):
    tokenizer.load(path=str(tmp_path / 'nowhere'))
  with pytest.raises(FileNotFoundError, match=r'no tokenizer\.json'):
    tokenizer.load(path=str(tmp_path))
  odd = tmp_path / 'model.xyz'
  odd.write_text('')
  with pytest.raises(ValueError, match="the word 'byte'"):
    tokenizer.load(path=str(odd))
  for name in ('cut.bin', 'cut.gguf'):
    cut = tmp_path / name
    cut.write_bytes(b'GGUF\x03\x00\x00\x00 and then nothing of the kind')
    with pytest.raises(
      ValueError, match=r'cut\.(bin: not a llama2|gguf: .*is truncated)'
    ):
      tokenizer.load(path=str(cut))
  byte.save(tmp_path / 'a')
  edit(tmp_path / 'a', 'tokenizer_config.json', bos_token='<nope>')
  with pytest.raises(ValueError, match="bos_token='<nope>' is not in the vocabulary"):
    tokenizer.load(path=str(tmp_path / 'a'))
  byte.save(tmp_path / 'b')
  edit(tmp_path / 'b', 'tokenizer_config.json', eos_token=None)
  edit(tmp_path / 'b', 'generation_config.json', eos_token_id=None)
  with pytest.raises(ValueError, match='names a stop token'):
    tokenizer.load(path=str(tmp_path / 'b'))
  (tmp_path / 'b' / 'tokenizer.json').write_text('{')
  with pytest.raises(ValueError, match=r'tokenizer\.json'):
    tokenizer.load(path=str(tmp_path / 'b'))
  byte.save(tmp_path / 'c')
  (tmp_path / 'c' / 'tokenizer_config.json').write_text('[]')
  with pytest.raises(ValueError, match=r'tokenizer_config\.json: expected an object'):
    tokenizer.load(path=str(tmp_path / 'c'))


def test_an_id_beyond_the_vocabulary_is_nothing_rather_than_a_crash():
  """A model whose embedding is padded may sample one."""
  words = tokenizer.load(path='byte')
  assert words.token_bytes(words.vocab_size + 3) == b''
  assert words.decode([104, words.vocab_size, 105]) == 'hi'


def test_half_a_surrogate_pair_is_refused():
  with pytest.raises(ValueError, match='text is not valid Unicode'):
    tokenizer.load(path='byte').encode('a\ud800b')
