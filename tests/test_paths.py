import pathlib

import pytest

from educe import paths


def test_package_paths_point_into_an_installed_package():
  found = paths.resolve('package://educe/types.py')
  assert found.name == 'types.py'
  assert found.is_file()


def test_data_paths_follow_the_environment(tmp_path, monkeypatch):
  (tmp_path / 'x.jsonl').write_text('{}')
  monkeypatch.setenv(paths.DATA, str(tmp_path))
  assert paths.resolve('data://x.jsonl') == tmp_path / 'x.jsonl'


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('package://no_such_package/x', 'pip install --no-deps no-such-package'),
    ('package://educe/no.gguf', r'package://educe/no.gguf: no such file'),
    ('data://no.jsonl', 'data://no.jsonl'),
    ('/no/such/file', '^/no/such/file: no such file or folder$'),  # the path once
  ],
)
def test_what_is_not_there_is_named(path, message, tmp_path, monkeypatch):
  monkeypatch.setenv(paths.DATA, str(tmp_path))
  with pytest.raises(FileNotFoundError, match=message):
    paths.resolve(path)


def test_an_output_folder_may_be_new_or_old_but_no_file(tmp_path):
  assert paths.output(tmp_path / 'a' / 'b', '--to') == tmp_path / 'a' / 'b'
  assert paths.output(str(tmp_path), '--to') == tmp_path
  assert paths.output('.', '--to') == pathlib.Path('.')
  assert paths.output('~/x', '--to') == pathlib.Path.home() / 'x'
  for empty in ('', ' '):
    with pytest.raises(ValueError, match=r'^--run_dir= ?.*is empty; name a folder'):
      paths.output(empty, '--run_dir')
  file = tmp_path / 'file'
  file.write_text('')
  for path in (file, file / 'below'):
    with pytest.raises(ValueError, match=rf'^--to={path}: {file} is a file; name a f'):
      paths.output(path, '--to')


def test_without_a_data_folder_the_variable_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv(paths.DATA, str(tmp_path / 'absent'))
  assert paths.data_root() is None
  with pytest.raises(FileNotFoundError, match='set EDUCE_DATA'):
    paths.resolve('data://x')


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
  file = tmp_path / 'a.json'
  paths.write(file, 'old')

  def fails():
    with paths.whole(file) as temporary:
      temporary.write_text('half')
      raise KeyError

  with pytest.raises(KeyError):
    fails()
  assert file.read_text() == 'old'
  assert [x.name for x in tmp_path.iterdir()] == ['a.json']


def test_two_processes_may_write_one_file_at_once(tmp_path, monkeypatch):
  """As two runs do that need the same reference log-probs: the last one's is there."""
  file = tmp_path / 'a.json'
  with paths.whole(file) as ours:
    ours.write_text('ours, and long')
    with monkeypatch.context() as other:
      other.setattr(paths.os, 'getpid', lambda: -1)
      with paths.whole(file) as theirs:
        theirs.write_text('theirs')
    assert file.read_text() == 'theirs'
  assert file.read_text() == 'ours, and long'
  assert [x.name for x in tmp_path.iterdir()] == ['a.json']


def test_who_may_read_it_is_as_of_any_file(tmp_path):
  paths.write(tmp_path / 'a', 'x')
  with paths.whole(tmp_path / 'b') as temporary:
    temporary.unlink()
    temporary.touch(0o600)  # as safetensors writes
  (tmp_path / 'c').touch()
  modes = {(tmp_path / name).stat().st_mode for name in 'abc'}
  assert len(modes) == 1


def test_its_folder_may_be_new(tmp_path):
  paths.write(tmp_path / 'a' / 'b' / 'c.txt', 'x')
  assert (tmp_path / 'a' / 'b' / 'c.txt').read_text() == 'x'


def test_what_cannot_be_written_is_named_with_the_mend(tmp_path):
  paths.write(tmp_path / 'a.txt', 'a file, not a folder')
  with pytest.raises(OSError, match=r'a\.txt/b\.txt: could not .* is the disk full'):
    paths.write(tmp_path / 'a.txt' / 'b.txt', 'x')


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
  paths.write(tmp_path / 'a.txt', 'ü\ud83d')
  assert (tmp_path / 'a.txt').read_bytes() == 'ü\\ud83d'.encode()
