"""Preferences to batches: whose log-probs are the reference's, and when they change."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from educe import cli, sections
from educe.algorithms import dpo as algorithm
from educe.data import pipeline, sources, tokenizer
from educe.data.shards import Shards
from educe.losses import dpo as real
from educe.models import lora, policy, presets
from educe.rollouts import transcripts
from educe.training import metrics, optimizer
from educe.training.step import init_state, make_step
from educe.types import Mean

BYTE = tokenizer.load(path='byte')
MODEL = policy.build(presets.debug)
PAIRS = [
  dict(prompt=f'{i}+1=', chosen=f'{i + 1}', rejected='x' * (i % 3 + 1))
  for i in range(9)
]
LABELLED = [
  dict(prompt=f'{i}', completion='c' * (i + 1), label=i % 2) for i in range(9)
]

# What a loss file says of its variants.
COUPLED = frozenset({'sorted', 'kto'})
UNPAIRED = ('kto',)


def loss(scores, batch, *, variant='sigmoid', beta=0.1):
  """A stand-in for losses/dpo.py, written from its equation; 'free' has no reference."""
  if variant == 'kto' and batch.labels is None:
    raise ValueError('kto: no labels')
  if variant != 'free' and batch.ref_logp is None:
    raise ValueError(f'{variant}: batch.ref_logp is None')
  logp = scores.logp
  if batch.ref_logp is not None:
    logp = logp - batch.ref_logp
  h = jnp.where(batch.mask > 0, logp, 0).sum(-1).reshape(-1, 2)
  margin = beta * (h[:, 0] - h[:, 1])
  real = (batch.mask.sum(-1).reshape(-1, 2) > 0).all(-1)
  total = jnp.where(real, jnp.logaddexp(0.0, -margin), 0).sum()
  count = real.sum() * 1.0
  margins = Mean(jnp.where(real, margin, 0).sum(), count)
  return Mean(total, count), {'rewards/margins': margins}


def params(seed=0):
  return MODEL.init(jax.random.key(seed))


def make(data=PAIRS, records='pairs', loss=loss, setting=None, start=None, **options):
  batches = pipeline.make(
    sources.memory(records=data), BYTE, batch_size=2, max_length=16, records=records
  )
  bound = functools.partial(loss, **(setting or {}))
  given = params() if start is None else start
  return algorithm.make(
    MODEL, given, batches, bound, lambda batch, shares=1: batch, **options
  )


def state_of(policy_seed=0, reference_seed=None):
  tx = optimizer.make(9, name='sgd', learning_rate=0.5, schedule='constant')
  state = init_state(params(policy_seed), tx, jax.random.key(0))
  if reference_seed is not None:
    state = state._replace(reference=params(reference_seed))
  return state, tx


def log_probs(weights, tokens):
  """`[B, T]` in float64 from the logits, aligned to the token that they score."""
  states, _ = MODEL.hidden(weights, tokens)
  matrix = np.asarray(MODEL.head(weights).matrix, np.float64)
  logits = np.asarray(states, np.float64) @ matrix
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  picked = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
  return np.pad(picked, ((0, 0), (1, 0)))


def test_ref_logp_is_the_references_and_not_the_policys():
  method = make()
  batch, info = method.next_batch(state_of(0, reference_seed=1)[0])
  want = log_probs(params(1), batch.tokens) * batch.mask
  # float32 forward against float64 from the same float32 states: 2e-5 nats.
  np.testing.assert_allclose(batch.ref_logp, want, atol=2e-5)
  assert np.abs(want - log_probs(params(0), batch.tokens) * batch.mask).max() > 0.05
  assert batch.labels is None
  assert batch.segments is None
  assert info['data/records'] == 2
  assert (method.rows, method.group, method.asks_policy) == (4, 2, True)
  assert method.reference_every == 0


def test_a_reference_that_moves_is_read_anew_at_every_step():
  method = make(reference_every=2, reference_alpha=0.6)
  assert (method.reference_every, method.reference_alpha) == (2, 0.6)
  for seed in (1, 2):
    batch, _ = method.next_batch(state_of(0, reference_seed=seed)[0])
    want = log_probs(params(seed), batch.tokens) * batch.mask
    np.testing.assert_allclose(batch.ref_logp, want, atol=2e-5)


def test_the_first_step_loses_ln_2():
  """The policy is its own reference; two programs may round apart (float32)."""
  method = make()
  state, tx = state_of(0, reference_seed=0)
  step = make_step(MODEL, method.loss, tx)
  batch, _ = method.next_batch(state)
  _, values = step(state, batch)
  assert float(values['loss']) == pytest.approx(np.log(2), abs=1e-6)
  assert float(values['rewards/margins']) == pytest.approx(0, abs=1e-6)
  assert float(values['grad_norm']) > 1e-3


def test_stored_log_probs_are_those_computed_at_every_step(tmp_path, capsys):
  plain, stored = make(), make(precompute=str(tmp_path / 'reference'))
  assert 'under the reference, once' in capsys.readouterr().err
  state, _ = state_of(1, reference_seed=0)
  without = state._replace(reference=None)
  for _ in range(6):
    one, other = plain.next_batch(state)[0], stored.next_batch(without)[0]
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.ref_logp, other.ref_logp)
  assert stored.reference_every is None
  assert not stored.asks_policy
  make(precompute=str(tmp_path / 'reference'))
  assert not capsys.readouterr().err
  make(precompute=str(tmp_path / 'reference'), start=params(3))
  assert len([*(tmp_path / 'reference').iterdir()]) == 2


def test_of_a_batch_that_processes_share_each_keeps_its_own_log_probs(tmp_path):
  """What the reference says comes back for all rows, those of other processes too."""

  def open_shard(shard, of, looks):
    return pipeline.make(
      sources.memory(records=PAIRS), BYTE, shard, of, looks=looks, batch_size=4 // of,
      max_length=16, records='pairs',
    )  # fmt: skip

  whole = Shards(open_shard)
  rows, _ = pipeline.read(whole)
  state, _ = state_of(1, reference_seed=0)
  for mine in (np.arange(2), np.arange(2, 8)):

    def place(batch, shares=1, mine=mine):
      if len(batch.tokens) == 8:  # for the stored ones all have all
        return batch
      tokens, mask = np.array(rows['tokens']), np.array(rows['mask'])
      tokens[mine], mask[mine] = batch.tokens, batch.mask
      return batch._replace(tokens=tokens, mask=mask)

    found = {}
    for precompute in (None, str(tmp_path / 'reference')):
      share = Shards(open_shard, 1, lambda n, mine=mine: mine)
      bound = functools.partial(loss)
      method = algorithm.make(
        MODEL, params(), share, bound, place, precompute=precompute
      )
      found[precompute] = method.next_batch(state)[0]
      assert method.rows == 8
    one, other = found.values()
    np.testing.assert_array_equal(one.tokens, rows['tokens'][mine])
    assert one.ref_logp.shape == one.tokens.shape
    assert (np.abs(one.ref_logp).sum(-1) > 0).all()
    np.testing.assert_allclose(one.ref_logp, other.ref_logp, atol=1e-5)


def test_a_loss_of_ones_own_need_not_say_what_it_misses(capsys):
  """Written as in a notebook: without a reference it is a TypeError."""

  def mine(scores, batch):
    h = jnp.where(batch.mask > 0, scores.logp - batch.ref_logp, 0).sum(-1)
    return Mean(jnp.logaddexp(0.0, h[1::2] - h[::2]).sum(), len(h) / 2), {}

  assert make(loss=mine).reference_every == 0
  assert 'warning' not in capsys.readouterr().err


def test_a_loss_without_a_reference(capsys):
  method = make(setting={'variant': 'free'}, reference_every=None)
  batch, _ = method.next_batch(state_of()[0])
  assert batch.ref_logp is None
  assert (method.reference_every, method.asks_policy) == (None, False)
  assert not capsys.readouterr().err
  make(setting={'variant': 'free'})
  assert 'warning: config.loss needs no reference' in capsys.readouterr().err


def test_labelled_completions_have_their_labels():
  method = make(LABELLED, 'unpaired', setting={'variant': 'kto'})
  batch, _ = method.next_batch(state_of(0, 1)[0])
  assert np.isnan(batch.labels[1::2]).all()
  assert set(batch.labels[::2]) <= {0, 1}
  want = log_probs(params(1), batch.tokens) * batch.mask
  np.testing.assert_allclose(batch.ref_logp, want, atol=2e-5)
  assert (want[1::2] != 0).any()


@pytest.mark.parametrize(
  ('variant', 'couples'),
  [
    ('sigmoid', False),
    ('sorted', True),
    ({'sigmoid': 0.5, 'sorted': 1.0}, True),
    ({'sigmoid': 0.5, 'sorted': 0.0}, False),
    (None, False),
  ],
)
def test_losses_that_couple_rows_say_so(variant, couples):
  setting = {} if variant is None else {'variant': variant}
  assert make(setting=setting).couples == couples


def test_the_family_of_losses_itself_is_read_the_same_way():
  for variant, couples in (
    ('aot', True),
    ('ipo', False),
    ({'aot': 1.0, 'sft': 1.0}, True),
  ):
    assert make(loss=real.loss, setting={'variant': variant}).couples == couples
  kto = dict(loss=real.loss, setting={'variant': 'kto'})
  assert make(LABELLED, 'unpaired', **kto).couples
  with pytest.raises(
    ValueError, match=r"'kto' is of records='unpaired', and these are "
  ):
    make(**kto)
  with pytest.raises(
    ValueError, match=r"'sigmoid' is of records='pairs', and these are"
  ):
    make(LABELLED, 'unpaired', loss=real.loss)  # the default is read as well


def test_the_first_step_of_the_loss_itself_loses_ln_2():
  method = make(loss=real.loss)
  state, tx = state_of(0, reference_seed=0)
  batch, _ = method.next_batch(state)
  _, values = make_step(MODEL, method.loss, tx)(state, batch)
  # Two programs of float32 log-probs round apart, times β = 0.1.
  assert float(values['loss']) == pytest.approx(np.log(2), abs=1e-6)
  assert float(values['rewards/margins']) == pytest.approx(0, abs=2e-6)
  assert float(values['grad_norm']) > 1e-3


@pytest.mark.parametrize('kind', ['lora', 'dora'])
def test_the_reference_of_an_adapter_is_the_adapter_as_it_was(kind):
  """A new one: the base. One that goes on: itself. Moving: what it has become."""
  model, new = lora.attach(MODEL, params(), rank=2, kind=kind)
  old = {
    **new,
    'adapter': jax.tree.map(
      lambda x: (
        x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if x.ndim else x
      ),
      new['adapter'],
    ),
  }
  tx = optimizer.make(
    9, name='sgd', learning_rate=0.5, schedule='constant', freeze=(lora.FROZEN,)
  )
  for start in (new, old):
    batches = pipeline.make(
      sources.memory(records=PAIRS), BYTE, batch_size=2, max_length=16, records='pairs'
    )
    method = algorithm.make(
      model, start, batches, real.loss, lambda batch, shares=1: batch, reference_every=1
    )
    mine = jax.tree.map(jnp.copy, start)
    state = init_state(mine, tx, jax.random.key(0), reference=True)
    held, whole = (
      sum(x.nbytes for x in jax.tree.leaves(tree))
      for tree in (state.reference, start['adapter']['layers'])
    )
    assert held == whole
    step = make_step(model, method.loss, tx, reference_every=1)
    for _ in range(2):
      now = lora.merged(state.params)
      batch, _ = method.next_batch(state)
      want = log_probs(now, batch.tokens) * (batch.mask > 0)
      np.testing.assert_allclose(batch.ref_logp, want, atol=2e-5)
      before = jax.tree.map(np.array, state.params)
      state, values = step(state, batch)
      # Two programs of float32 log-probs round apart, times β = 0.1.
      assert float(values['loss']) == pytest.approx(np.log(2), abs=1e-6)
      moved = np.abs(
        state.params['adapter']['layers']['mlp']['up']['b']
        - before['adapter']['layers']['mlp']['up']['b']
      )
      assert moved.max() > 1e-5
    np.testing.assert_array_equal(state.params['embedding'], start['embedding'])


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    (dict(records='documents', data=[dict(text='t')] * 4), "records='documents': dpo"),
    (dict(setting={'variant': 'kto'}), "'kto' is of records='unpaired', and"),
    (dict(records='unpaired', data=LABELLED), "'sigmoid' is of records='pairs', and"),
    (dict(reference_every=None), 'config.loss: sigmoid: batch.ref_logp is None'),
    (dict(reference_every=-1), 'reference_every=-1 must be ≥ 0'),
    (dict(reference_every=4, reference_alpha=0.0), 'reference_alpha=0.0 in'),
    (dict(reference_alpha=0.6), 'is of a reference that moves'),
    (dict(precompute='x', reference_every=4), 'it needs reference_every=0, not 4'),
    (
      dict(precompute='x', reference_every=None),
      'it needs reference_every=0, not None',
    ),
    (
      dict(
        precompute='x', records='unpaired', data=LABELLED, setting={'variant': 'kto'}
      ),
      'others in each epoch',
    ),
  ],
)
def test_settings_that_cannot_be(options, match):
  with pytest.raises(ValueError, match=match):
    make(**options)


CONFIG = """
import ml_collections
def get_config():
  return ml_collections.ConfigDict(dict(
    seed=0, steps=12, save_every=6,
    model=dict(name='scratch', preset='debug'),
    tokenizer=dict(path='byte'),
    mesh=dict(data=-1),
    source=dict(name='memory', records={pairs}),
    data=dict(batch_size=8, max_length=16, records='pairs'),
    algorithm=dict(name='dpo'),
    loss=dict(name='stand_in_loss:loss', beta=1.0),
    optimizer=dict(name='adamw', learning_rate=3e-3, schedule='constant'),
    evaluation=dict(
      name='agreement', beta=1.0, max_length=16, batch_size=8,
      source=dict(name='memory', records={pairs}),
    ),
  ))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
  """A run of the stand-in loss, by its dotted name."""
  source = pathlib.Path(__file__).read_text()
  body = source[source.index('# What a loss file') : source.index('def params(')]
  head = 'import jax.numpy as jnp\nfrom educe.types import Mean\n'
  (tmp_path / 'stand_in_loss.py').write_text(head + body)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'stand_in_loss', raising=False)
  path = tmp_path / 'config.py'
  path.write_text(CONFIG.replace('{pairs}', repr(PAIRS)))
  return f'--config={path}'


def read(folder):
  rows = metrics.read(folder / 'metrics.jsonl')
  return [r for r in rows if 'loss' in r], [r for r in rows if 'accuracy' in r]


def test_a_run_learns_its_pairs_stops_and_goes_on(config, tmp_path, capsys):
  def go(folder, *flags):
    return cli.main(['train', config, f'--run_dir={tmp_path / folder}', *flags])

  assert go('whole') == 0, capsys.readouterr().err
  steps, exams = read(tmp_path / 'whole')
  assert steps[0]['loss'] == pytest.approx(np.log(2), abs=1e-5)
  assert steps[-1]['loss'] < 0.3
  assert steps[-1]['rewards/margins'] > 1
  first, last = exams
  assert first['preferences/margin'] == pytest.approx(0, abs=1e-4)
  assert first['preferences/nll'] == pytest.approx(np.log(2), abs=1e-4)
  assert last['accuracy'] == 1
  assert last['accuracy/low'] == pytest.approx(0.7008, abs=1e-3)  # Wilson of 9 in 9
  assert last['preferences/nll'] < 0.3
  said = capsys.readouterr().err
  assert 'agrees with 100.0% of 9 pairs' in said
  (sample,) = transcripts.load(tmp_path / 'whole/samples/12.jsonl', 1)
  assert set(sample) == {'id', 'prompt', 'chosen', 'rejected', 'rewards'}
  # Stopped in the middle, with the reference stored instead of kept: the same losses.
  store = f'--config.algorithm.precompute={tmp_path / "reference"}'
  assert go('parts', '--config.steps=6', store) == 0
  assert go('parts', store) == 0
  again, judged = read(tmp_path / 'parts')
  np.testing.assert_allclose(
    [r['loss'] for r in again], [r['loss'] for r in steps], rtol=0, atol=1e-6
  )
  assert len([*(tmp_path / 'reference').iterdir()]) == 1
  # And judged against where the run began, although it kept no reference.
  for name in ('preferences/margin', 'preferences/nll'):
    assert judged[-1][name] == pytest.approx(last[name], abs=1e-4)


def test_how_the_reference_follows_reaches_the_step(config, tmp_path, monkeypatch):
  class Seen(Exception):
    pass

  def look(*_, **options):
    raise Seen(options)

  monkeypatch.setattr(sections, 'make_step', look)
  flags = [f'--config.algorithm.reference_{x}' for x in ('every=3', 'alpha=0.6')]
  with pytest.raises(Seen) as caught:
    cli.main(['train', config, f'--run_dir={tmp_path / "run"}', *flags])
  (options,) = caught.value.args
  assert (options['reference_every'], options['reference_alpha']) == (3, 0.6)


def test_a_runs_reference_follows_at_the_pace_that_it_was_told(config, tmp_path):
  """Copied at every step, policy and reference are one, and the loss stays ln 2; moved
  by a millionth of the way, it all but stays where it was, and the loss falls."""
  losses = {}
  for alpha in ('1.0', '1e-6'):
    flags = ['--config.steps=4', '--config.algorithm.reference_every=1']
    flags += [f'--config.algorithm.reference_alpha={alpha}']
    assert cli.main(['train', config, f'--run_dir={tmp_path / alpha}', *flags]) == 0
    losses[alpha] = [row['loss'] for row in read(tmp_path / alpha)[0]]
  # Two float32 programs of log-probs of up to 20 nats, β = 1.
  np.testing.assert_allclose(losses['1.0'], [np.log(2)] * 4, atol=1e-4)
  assert losses['1e-6'][-1] < np.log(2) - 0.01


def test_what_a_run_refuses(config, tmp_path, capsys):
  def refused(*flags):
    assert cli.main(['train', config, f'--run_dir={tmp_path / "r"}', *flags]) == 1
    return ' '.join(capsys.readouterr().err.split())

  cut = '--config.microbatches=2'
  said = refused(cut, '--config.loss.variant=sorted')
  assert 'microbatches=2: the loss compares rows across the whole batch' in said
  # Eight devices have eight rows, but four pairs.
  assert 'multiple of 16' in refused('--config.data.batch_size=4')
  assert 'multiple of 32' in refused(cut)
