"""Messages and bars go to stderr: stdout belongs to results."""

import pytest

from educe import progress


def test_a_message_goes_to_stderr(capsys):
  progress.say('hello')
  out, err = capsys.readouterr()
  assert (out, err) == ('', 'hello\n')


def test_a_message_does_not_tear_a_bar(capsys):
  with progress.steps(10, 0) as bar:
    bar.update(3)
    progress.say('hello')
  lines = capsys.readouterr().err.replace('\r', '\n').splitlines()
  assert 'hello' in [line.strip() for line in lines]


@pytest.mark.parametrize('start', [0, 4])
def test_a_bar_starts_where_the_run_stands(start):
  with progress.steps(10, start) as bar:
    assert (bar.n, bar.initial, bar.total) == (start, start, 10)


def test_only_the_first_process_speaks_but_any_may_complain(as_processes, capsys):
  def run(index):
    with progress.steps(10, 0) as bar:
      if index:
        bar.update(3)
    progress.say(f'from {index}')

  as_processes(2, run)
  err = capsys.readouterr().err
  assert 'from 0' in err
  assert 'from 1' not in err
  assert '3/10' not in err
  as_processes(2, lambda index: progress.complain(f'wrong in {index}') if index else 0)
  assert capsys.readouterr().err == 'wrong in 1\n'
