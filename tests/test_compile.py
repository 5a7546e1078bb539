"""What `educe compile` says: of programs for chips that are not here, and of mistakes."""

import json
import types

import jax
import pytest

from educe import cli, compile, config, topology

CONFIG = """
import ml_collections

def get_config(kind='sft'):
  config = ml_collections.ConfigDict(dict(
    steps=1,
    model=dict(
      name='scratch', preset='chain', compute_dtype='bfloat16', remat='full',
      logprob='pallas_tpu',
    ),
    tokenizer=dict(path='characters:012345abcdefgh='),
    mesh=dict(data=1, fsdp=-1),
    optimizer=dict(name='adamw', learning_rate=1e-3),
    loss=dict(name=kind),
    algorithm=dict(name=kind),
  ))
  if kind == 'sft':
    config.source = dict(
      name='educe.environments.chain:records', size=64, exposure=1.0, shares=(1.0,),
    )
    config.data = dict(batch_size=8, max_length=8)
  else:
    config.environment = dict(name='chain', depth=1, reward='outcome')
    config.rollouts = dict(prompts=64, group=2, max_new_tokens=2, workers=0)
    config.advantage = dict(name='group_relative')
    config.algorithm.reference_every = 0
    config.loss.kl_coef = 0.1
  return config
"""
STAGES = """
import ml_collections

def get_config():
  one = dict(ONE)
  return ml_collections.ConfigDict(dict(stages=('first', 'second'), first=one, second=one))
"""
# A model as large as it is: what is compiled is a scan, of one layer as of all.
LLAMA = (
  '--preset=llama3_8b',
  '--config.mesh.fsdp=-1',
  '--effort=-1',
  '--programs=train',
)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'config.py'
  path.write_text(CONFIG)
  return path


@pytest.fixture
def compiled(file, tmp_path, capfd):
  """compiled(kind, flags…) -> (what --to got, what was printed)."""

  def of(kind, *flags):
    to = tmp_path / 'out' / 'found.json'
    done = cli.main(['compile', f'--config={file}:{kind}', f'--to={to}', *flags])
    printed = capfd.readouterr().err
    assert done == 0, printed
    return json.loads(to.read_text()), printed

  return of


@pytest.mark.usefixtures('chips')
def test_every_program_of_a_run_is_compiled_and_told(compiled):
  found, printed = compiled('grpo', '--topology=v5e:2x4', '--effort=-1', '--rows=16')
  assert (found['devices'], found['mesh']) == (8, {'fsdp': 8})
  assert (found['rows'], found['length']) == (16, 16)
  names = ['train', 'score', 'prefill', 'decode']
  assert list(found['programs']) == names
  lines = printed.splitlines()
  assert [line.split()[0] for line in lines[-4:]] == names
  for name, said in found['programs'].items():
    assert said['fits']
    assert said['device'] == 'TPU v5 lite'
    assert said['seconds'] == max(said['floors_seconds'].values())
    learns = name in ('train', 'score')
    assert said['kernels'] == (['logprob', 'attention'] if learns else [])
  train = found['programs']['train']
  assert train['sent_gb']['all-gather'] > 0
  # The params, two moments and a reference, of which a device has an eighth, or all where
  # an axis does not divide.
  state = 4 * 4 * found['params'] / 1e9
  assert state / 8 < train['arguments_gb'] < state
  # The whole state lies beside what decodes; as operands small arrays are padded.
  assert state / 8 < found['programs']['decode']['beside_gb'] <= train['arguments_gb']


@pytest.mark.usefixtures('chips')
@pytest.mark.parametrize('recipe', ['sft', 'grpo'])
@pytest.mark.parametrize(
  ('pod', 'mesh'), [('v5p:4x4x4', (4, 16)), ('v6e:4x4', (1, 16))]
)
def test_llama_3_8b_fits_a_pod_with_our_kernels(compiled, recipe, pod, mesh):
  data, fsdp = mesh
  rows = data * fsdp
  flags = (f'--topology={pod}', f'--rows={rows}', f'--config.mesh.data={data}', *LLAMA)
  if recipe == 'grpo':
    flags += ('--prompt=1024', '--config.rollouts.max_new_tokens=1024')
  else:
    flags += ('--config.data.max_length=2048',)
  found, _ = compiled(recipe, *flags)
  assert found['params'] == 8_030_261_248
  assert found['devices'] == rows >= 16
  assert (found['rows'], found['length']) == (rows, 2048)
  train = found['programs']['train']
  assert train['fits']
  assert train['peak_gb'] < topology.CHIPS[train['device']].memory / 1e9
  assert train['kernels'] == ['logprob', 'attention']
  copies = 4 if recipe == 'grpo' else 3
  assert train['arguments_gb'] == pytest.approx(
    copies * 4 * found['params'] / fsdp / 1e9, rel=0.01
  )
  # bfloat16 weights are gathered twice, forward and for the gradient, and gradients summed
  # once: as much as a ring sends. The head's is float32, and its sum whole over a slice.
  head = 4096 * 128_256
  ring = 3 * 2 * found['params'] + 2 * 4 * head
  assert sum(train['sent_gb'].values()) < ring / 1e9
  if (
    data > 1
  ):  # what is summed over data is a part of each gradient, not the whole of any
    part = 2 * (data - 1) / data * 4 * found['params'] / fsdp
    assert train['sent_gb']['all-reduce'] < part / 1e9
  assert 0.1 < train['mfu'] < 0.8  # remat='full' takes a quarter of what the layers do


@pytest.mark.usefixtures('chips')
@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--topology=v5p-128'], 'v5p-128 counts cores and has 64 chips'),
    (['--topology=v9:2x2'], 'no such generation'),
    (['--topology=v5e:2x4', '--config.mesh.fsdp=3'], 'needs 3 devices; 8 are here'),
    (['--topology=v5e:2x4', '--rows=12'], 'does not divide'),
    (
      ['--topology=v5e:2x4', '--programs=decode'],
      '--programs=decode: the run has train',
    ),
    (['--topology=v5e:2x4', '--stage=one'], 'the config has no stages'),
    (['--topology=v5e:2x4', '--effort=2'], '--effort=2.0 must be from'),
    (['--topology=v5e:2x4', '--preset=gpt5'], "no architecture is called 'gpt5'"),
    (['--topology=v5e:2x4', '--speed=1'], "unknown argument '--speed=1'"),
    (['--topology=v5e:2x4', '--to='], '--to= is no file'),
  ],
)
def test_a_mistake_is_one_clear_line(file, flags, said, capfd):
  assert cli.main(['compile', f'--config={file}', *flags]) == 1
  lines = capfd.readouterr().err.strip().splitlines()
  assert len(lines) == 1
  assert lines[0].startswith('educe: ')
  assert said in lines[0]


def test_of_stages_one_is_named(tmp_path):
  path = tmp_path / 'stages.py'
  path.write_text(STAGES.replace('ONE', 'steps=1'))
  argv = [f'--config={path}']
  with pytest.raises(ValueError, match='--stage is missing: name one of first, second'):
    compile.compile_config(argv, 'v5e:2x4')
  with pytest.raises(ValueError, match="--stage 'third' is none: name one of"):
    compile.compile_config(argv, 'v5e:2x4', stage='third')
  with pytest.raises(config.ConfigError, match=r'config\.second\.model is missing'):
    compile.compile_config(argv, 'v5e:2x4', stage='second')


def linear(base, slope, memory, asked):
  """A program whose peak is base + slope·rows, in GB."""

  def fits(rows):
    asked.append(rows)
    peak = base + slope * rows
    return {'peak_gb': peak, 'fits': peak <= memory, 'compile_seconds': 1.0}

  return fits


@pytest.mark.parametrize(
  ('base', 'slope', 'most'),
  [(10, 0.1, 128), (31.9, 0.001, 64), (20, 1.0, 8), (0, 4.0, 8), (30, 1.0, None)],
)
def test_the_largest_batch_is_found_without_trying_all(base, slope, most):
  asked = []
  found = compile.most_rows(linear(base, slope, 32, asked), 8, 32e9)
  if base + 8 * slope > 32:
    assert found is None
    assert asked == [8]
    return
  assert found['rows'] == max(
    8 * 2**i for i in range(20) if base + 8 * 2**i * slope <= 32
  )
  assert most is not None
  assert len(asked) == len(set(asked)) <= 5


def test_peaks_that_are_no_line_are_tried_until_one_fits():
  asked = []

  def fits(rows):  # steeper the larger it is
    asked.append(rows)
    return {
      'peak_gb': 1 + rows**2 / 1000,
      'fits': rows <= 128,
      'compile_seconds': 1.0,
    }

  assert compile.most_rows(fits, 8, 32e9)['rows'] == 128
  assert len(asked) == len(set(asked))


def failing(message):
  def refuse(compiler_options):
    raise jax.errors.JaxRuntimeError(message)

  return types.SimpleNamespace(lower=lambda: types.SimpleNamespace(compile=refuse))


def test_what_no_memory_holds_is_told_and_other_errors_are_not_hidden():
  text = (
    'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nUsed 20G of 15.75G'
  )
  found = compile.measured(failing(text), None, 0.0)
  assert not found['fits']
  assert found['reason'] == text.replace('\n', ' ')
  said = compile.line('train', found)
  assert 'DOES NOT FIT: RESOURCE_EXHAUSTED: Ran out of memory' in said
  other = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem'
  with pytest.raises(jax.errors.JaxRuntimeError, match='vmem'):
    compile.measured(failing(other), None, 0.0)
