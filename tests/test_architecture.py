"""The house rules that a reader relies on, checked from the sources themselves."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / 'src' / 'educe'
FILES = sorted(p for p in SOURCE.rglob('*.py') if p.name != '__init__.py')

# Floors, lowest first. A file imports from lower floors and from its own folder.
FLOORS = [
  {'roll_call'},
  {'hosts'},
  {'types', 'memory', 'paths', 'progress', 'spelling', 'collectives', 'topology'},
  {'sharding', 'kernels'},
  {'data', 'models', 'environments'},
  {'losses'},
  {'rollouts'},
  {'algorithms', 'training'},
  {'measurement'},
  {'config'},
  {'recipes', 'policies', 'roofline', 'mesh_checks'},
  {'sections'},
  {'runs', 'measure', 'plans'},
  {'stages', 'compile'},
  {'cli'},
  {'__main__'},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def place(path: pathlib.Path) -> str:
  """kernels for kernels/logprob/chunked.py, config for config.py."""
  return path.relative_to(SOURCE).with_suffix('').parts[0]


def imports(path: pathlib.Path) -> list[str]:
  """Every module that a file imports, wherever in it, as dotted names."""
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_point_down(path):
  here = place(path)
  assert here in FLOOR, f'{path} is on no floor'
  for name in imports(path):
    if name.startswith('educe.'):
      there = name.split('.')[1]
      assert there == here or FLOOR[there] < FLOOR[here], f'{here} imports {name}'


def test_flax_is_imported_only_inside_models():
  users = {
    place(p) for p in FILES if any(n.split('.')[0] == 'flax' for n in imports(p))
  }
  assert users == {'models'}


def test_every_named_package_is_really_used():
  used = {name.split('.')[0] for path in FILES for name in imports(path)}
  needed = {'jax', 'flax', 'optax', 'orbax', 'grain', 'ml_collections'}
  assert needed <= used
  assert 'tensorflow_datasets' in (SOURCE / 'data' / 'sources.py').read_text()


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_file_has_a_twin_test(path):
  inner = path.relative_to(SOURCE)
  if inner.name == '__main__.py':
    inner = inner.with_name('cli.py')
  twin = ROOT / 'tests' / inner.with_name(f'test_{inner.name}')
  if inner.parent.parent.name == 'kernels':  # implementations of an op share its test
    twin = ROOT / 'tests' / 'kernels' / f'test_{inner.parent.name}.py'
  assert twin.exists(), f'write {twin.relative_to(ROOT)}'


def test_no_file_outgrows_a_sitting():
  long = {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
  assert not long


def test_the_loop_can_be_copied():
  assert len((SOURCE / 'training' / 'loop.py').read_text().splitlines()) <= 200


def test_no_file_is_a_drawer():
  drawers = re.compile(r'utils?|common|base_.*|.*_lib|.*manager|.*registry|helpers?')
  assert not [p for p in FILES if drawers.fullmatch(p.stem)]


def test_the_readme_tree_lists_every_file_and_only_those():
  readme = (ROOT / 'README.md').read_text()
  tree = readme.split('<!-- tree -->')[1]
  stack, listed = [], set()
  for line in tree.splitlines():
    match = re.match(r'( *)([\w./-]+)(?: {2,}\S|$)', line)
    if not match:
      continue
    depth, name = len(match[1]) // 2, match[2]
    stack = [*stack[:depth], name.rstrip('/')]
    if not name.endswith('/'):
      listed.add('/'.join(stack))
  groups = {'src/educe', 'configs', 'benchmarks', 'experiments', 'notebooks', 'scripts'}
  present = {
    str(path.relative_to(ROOT))
    for group in groups
    for path in (ROOT / group).rglob('*')
    if path.suffix in {'.py', '.md', '.ipynb', '.mplstyle', '.sh', '.yaml'}
    and path.name != '__init__.py'
    and '.ipynb_checkpoints' not in path.parts
  } | {f'src/educe/kernels/{op}/__init__.py' for op in ('advantage', 'logprob')}
  listed_there = {name for name in listed if any(name.startswith(g) for g in groups)}
  assert listed_there == present
  assert all((ROOT / name).exists() for name in listed)
  without = [n for n in re.findall(r'^ *([\w./-]+)$', tree, re.M) if '.' in n]
  assert not without, f'no gloss: {without}'


def test_the_repository_speaks_of_the_project_alone():
  machine = re.compile(r'/work/|/root/|/tmp/|pythonhosted|pypi\.org|registry\.npmjs')
  kinds = {'.py', '.md', '.ipynb', '.toml', '.sh', '.yaml'}
  texts = [p for p in ROOT.rglob('*') if p.suffix in kinds]
  mine = [p for p in texts if not {'.venv', 'runs', '.git'} & set(p.parts)]
  assert len(mine) > 40
  for path in mine:
    if path != pathlib.Path(__file__) and 'site-packages' not in path.parts:
      assert not machine.search(path.read_text()), path


def test_no_section_function_takes_the_name_that_chooses_it():
  """`name` picks the function and is not passed on: an argument of that name is lost."""
  from educe.config import PLACES

  for place in PLACES.values():
    if '{name}' in place:
      folder = SOURCE / place.split(':')[0].removeprefix('educe.').replace('.', '/')
      files = [folder.with_suffix('.py')] if '{name}' not in folder.name else list(
        folder.parent.glob('*.py')
      )  # fmt: skip
      entry = place.split(':')[1]
      for path in files:
        for node in ast.parse(path.read_text()).body:
          if isinstance(node, ast.FunctionDef) and entry in (node.name, '{name}'):
            assert 'name' not in {a.arg for a in node.args.kwonlyargs}, (
              path,
              node.name,
            )
