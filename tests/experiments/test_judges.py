"""Every experiment is judged by script, and its README says what the script says."""

import pathlib
import re
import subprocess
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
FOLDERS = sorted(x.parent for x in EXPERIMENTS.glob('*/README.md'))
LINE = re.compile(r'(PASS|FAIL)  ([\w.]+) +(\S.*)')
ROW = re.compile(r'^\| `([\w.]+)`.*\| (PASS|FAIL) \|$', re.MULTILINE)


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda x: x.name)
def test_what_the_judge_prints_is_what_the_readme_says(folder, tmp_path):
  # From elsewhere and by itself: it needs its results, and nothing of the caller's.
  done = subprocess.run(
    [sys.executable, str(folder / 'judge.py')],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.stderr
  lines = [LINE.fullmatch(line) for line in done.stdout.splitlines()]
  assert lines
  assert all(lines), done.stdout
  printed = {line[2]: line[1] for line in lines}
  written = {
    name: word for name, word in ROW.findall((folder / 'README.md').read_text())
  }
  assert written == printed
  assert done.returncode == ('FAIL' in printed.values())
