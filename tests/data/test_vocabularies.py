"""Foreign formats, from files small enough to write here."""

import struct

import pytest
import tokenizers

from educe.data import tokenizer, vocabularies

gguf = pytest.importorskip('gguf')


def write_gguf(path, pre='smollm', model='gpt2', add_bos=False, eos=True):
  """Bytes, the merge of '1' and '2', a control and a user-defined token."""
  tokens = [*vocabularies.byte_alphabet().values(), '12', '<|end|>', '<mine>']
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([1] * 257 + [3, 4])
  writer.add_token_merges(['1 2'])
  writer.add_bos_token_id(257)
  if eos:
    writer.add_eos_token_id(257)
    writer.add_eot_token_id(258)
  writer.add_add_bos_token(add_bos)
  writer.add_chat_template('{{ messages }}')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def test_gguf_pre_tokenizer_decides_about_digits(tmp_path):
  digits = tokenizer.load(path=write_gguf(tmp_path / 'a.gguf'))
  plain = tokenizer.load(path=write_gguf(tmp_path / 'b.gguf', pre='gpt-2'))
  one, two = (list(vocabularies.byte_alphabet()).index(ord(c)) for c in '12')
  assert digits.encode('12') == [one, two]
  assert plain.encode('12') == [256]
  assert digits.decode([256]) == '12'


def test_gguf_ids_and_kinds(tmp_path):
  tok = tokenizer.load(path=write_gguf(tmp_path / 'a.gguf'))
  assert (tok.bos_id, tok.eos_ids, tok.pad_id) == (257, (257, 258), 257)
  assert tok.special_ids == {257}
  assert tok.encode('<|end|><mine>') == [257, 258]
  # User-defined tokens are ordinary words: they stay in untrusted text.
  assert tok.encode('<mine>', special=False) == [258]
  assert len(tok.encode('<|end|>', special=False)) == 7
  assert tok.chat_template == '{{ messages }}'
  assert not tok.add_bos
  with_bos = tokenizer.load(path=write_gguf(tmp_path / 'b.gguf', add_bos=True))
  assert with_bos.add_bos
  assert with_bos.encode('') == []  # BOS is never written by encode()
  with_bos.save(tmp_path / 'saved')
  assert tokenizer.load(path=str(tmp_path / 'saved')).add_bos


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    (dict(pre='tekken'), r"ggml\.pre='tekken' is not supported \(one of"),
    (dict(model='bert'), r"ggml\.model='bert' is not supported"),
    (dict(eos=False), r'no tokenizer\.ggml\.eos_token_id'),
  ],
)
def test_gguf_that_is_not_supported(options, match, tmp_path):
  with pytest.raises(ValueError, match=match):
    tokenizer.load(path=write_gguf(tmp_path / 'a.gguf', **options))


def test_byte_alphabet_is_that_of_the_library():
  alphabet = vocabularies.byte_alphabet()
  assert sorted(alphabet) == list(range(256))
  assert set(alphabet.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  assert (alphabet[ord(' ')], alphabet[ord('\n')], alphabet[ord('a')]) == tuple('ĠĊa')


def test_vocabularies_that_do_not_know_their_bytes():
  backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({'[UNK]': 0, 'a': 1}))
  backend.decoder = tokenizers.decoders.WordPiece()
  with pytest.raises(ValueError, match='only byte-level and byte-fallback'):
    vocabularies.byte_table(backend)


def test_llama2c_file_must_be_whole(tmp_path):
  path = tmp_path / 'tok.bin'
  pieces = ['<unk>', '\n<s>\n', '\n</s>\n', *(f'<0x{b:02X}>' for b in range(256))]
  data = struct.pack('<i', 7)
  for piece in pieces:
    data += struct.pack('<fi', 0.0, len(piece)) + piece.encode()
  path.write_bytes(data)
  assert tokenizer.load(path=str(path)).vocab_size == 259
  for wrong in (data[:-3], data[: len(data) // 2], struct.pack('<i', 3) + data[4:]):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r'tok\.bin: not a llama2\.c tokenizer file'):
      tokenizer.load(path=str(path))


def test_an_alphabet_is_a_vocabulary(tmp_path):
  small = tokenizer.load(path='characters:ab =')
  assert small.vocab_size == 5
  assert small.encode('b =a<|end|>') == [1, 2, 3, 0, 4]
  assert small.encode_with_offsets('ab')[1] == [(0, 1), (1, 2)]
  assert small.decode([1, 2, 3, 0, 4], skip_special=True) == 'b =a'
  assert small.special_ids == {4} == {*small.eos_ids, small.pad_id}
  with pytest.raises(ValueError, match="lacks: 'abc'"):
    small.encode('abc')
  small.save(tmp_path)
  assert tokenizer.load(path=str(tmp_path)).encode('b =a<|end|>') == [1, 2, 3, 0, 4]


@pytest.mark.parametrize('alphabet', ['', 'aa', 'aé', 'a\n'])
def test_alphabets_that_are_none(alphabet):
  with pytest.raises(ValueError, match='must'):
    tokenizer.load(path=f'characters:{alphabet}')
