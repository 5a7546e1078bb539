"""Which text each step learns from, and what the teacher says of it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from educe.algorithms import distillation as algorithm
from educe.data import pipeline, sources
from educe.data import tokenizer as tokenizers
from educe.environments import chain
from educe.losses import distillation
from educe.models import policy, presets
from educe.rollouts import rounds
from educe.sharding import mesh_over
from educe.training import optimizer
from educe.training.step import init_state, make_step
from educe.types import StateMismatch

WORDS = tokenizers.load(path=f'characters:{chain.ALPHABET}')
V = WORDS.vocab_size
STUDENT, START = toy.model(vocabulary=V)
START = np.array(START)  # a step donates what lies on the device
TEXTS = [{'prompt': f'{i}a=', 'completion': 'bc'[: 1 + i % 2]} for i in range(6)]


@functools.cache
def teacher(vocabulary=V):
  """Of another architecture: a transformer whose params are a tree."""
  architecture = dataclasses.replace(presets.debug, vocab_size=vocabulary)
  model = policy.build(architecture)
  # Embeddings as they start are nearly uniform: this one has opinions.
  params = jax.tree.map(lambda x: 8 * x, model.init(jax.random.key(3)))
  return model, jax.tree.map(np.array, params)


def texts(batch_size=4):
  source = sources.memory(records=TEXTS)
  return pipeline.make(
    source, WORDS, 0, 1, batch_size=batch_size, max_length=8, seed=0, workers=0
  )


def sampled(**changes):
  settings = dict(prompts=2, group=2, max_new_tokens=3, workers=0, show_every=0)
  world = chain.make(depth=1)
  return rounds.make(STUDENT, WORDS, world, 0, **(settings | changes))


def build(
  run_dir, *, data=None, rollouts=None, seed=0, loss=None, whose='ours', **options
):
  loss = loss or {'objective': 'jsd'}
  mesh = mesh_over(jax.devices()[:1])
  return algorithm.make(
    STUDENT,
    functools.partial(distillation.loss, **loss),
    lambda batch, shares=1: batch,
    mesh,
    run_dir,
    seed,
    rollouts,
    data,
    teacher=teacher() if whose == 'ours' else whose,
    **options,
  )


def state_of(method, params=START, step=0):
  tx = optimizer.make(99, name='sgd', learning_rate=20.0, schedule='constant')
  state = init_state(jnp.asarray(params), tx, jax.random.key(0))
  return state._replace(reference=method.reference, step=jnp.int32(step)), tx


def student_logp(tokens, temperature=1.0):
  """log-probs of every next token, float64, `[B, T, V]`; row t speaks of token t."""
  out = np.zeros((*tokens.shape, V))
  for row, line in enumerate(np.asarray(tokens)):
    for t in range(1, len(line)):
      out[row, t] = toy.log_softmax(toy.logits(START, line[:t]) / temperature)
  return out


def teacher_logp(tokens, temperature=1.0):
  model, params = teacher()
  states, _ = model.hidden(params, jnp.asarray(tokens))
  z = np.float64(states) @ np.float64(model.head(params).matrix) / temperature
  return np.pad(toy.log_softmax(z), ((0, 0), (1, 0), (0, 0)))[:, :-1]


def jsd(log_p, log_q, beta):
  p, q = np.exp(log_p), np.exp(log_q)
  m = np.log(beta * p + (1 - beta) * q)
  return beta * (p * (log_p - m)).sum(-1) + (1 - beta) * (q * (log_q - m)).sum(-1)


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('microbatches', [1, 2])
def test_the_step_minimises_the_divergence_to_the_teacher(
  tmp_path, temperature, microbatches
):
  """Through the real step, with β and the sampling temperature that were asked for."""
  rollouts = sampled(temperature=temperature)
  loss = {'objective': 'jsd', 'beta': 0.3}
  method = build(tmp_path, rollouts=rollouts, loss=loss)
  state, tx = state_of(method)
  batch, info = method.next_batch(state)
  assert 'reward' in info
  log_p, log_q = (f(batch.tokens, temperature) for f in (teacher_logp, student_logp))
  mask = np.asarray(batch.mask)
  want = (jsd(log_p, log_q, 0.3) * mask).sum() / mask.sum()
  step = make_step(
    STUDENT, method.loss, tx, scorer=method.score, microbatches=microbatches
  )
  before = jax.tree.map(np.array, method.reference)
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  # Two float32 models of log-probs of up to 10 nats: 1e-5.
  assert losses[0] == pytest.approx(want, abs=2e-5)
  assert losses[-1] < losses[0] / 2  # the toy sees only Σ tokens: it cannot reach 0
  jax.tree.map(np.testing.assert_array_equal, state.reference, before)


def test_the_gradient_is_the_same_however_the_batch_is_cut(tmp_path):
  params, batch = [], None
  for microbatches in (1, 2, 4):
    method = build(tmp_path, rollouts=sampled())
    state, tx = state_of(method)
    batch = batch or method.next_batch(state)[0]
    step = make_step(
      STUDENT, method.loss, tx, scorer=method.score, microbatches=microbatches
    )
    params.append(np.asarray(step(state, batch)[0].params))
  # A learning rate of 20 times float32's 6e-8, of gradients of up to 0.1.
  np.testing.assert_allclose(params[1], params[0], atol=2e-6)
  np.testing.assert_allclose(params[2], params[0], atol=2e-6)
  assert np.abs(params[0] - START).max() > 0.1


def test_reverse_kl_has_the_teachers_log_probs_of_the_students_tokens(tmp_path):
  method = build(tmp_path, rollouts=sampled(), loss={'objective': 'reverse_kl'})
  state, _ = state_of(method)
  batch, _ = method.next_batch(state)
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  want = np.take_along_axis(teacher_logp(tokens), tokens[..., None], -1)[..., 0] * mask
  np.testing.assert_allclose(batch.ref_logp, want, atol=1e-5)
  assert batch.old_logp is None
  assert method.score is None
  several = build(
    tmp_path, rollouts=sampled(), loss={'objective': 'reverse_kl'}, epochs=2
  )
  batch, _ = several.next_batch(state_of(several)[0])
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  old = np.take_along_axis(student_logp(tokens), tokens[..., None], -1)[..., 0] * mask
  np.testing.assert_allclose(batch.old_logp, old, atol=1e-5)


@pytest.mark.parametrize('temperature', [0.7, 1.3])
def test_reverse_kl_is_between_the_distributions_that_are_sampled(
  tmp_path, temperature
):
  loss = {'objective': 'reverse_kl'}
  method = build(tmp_path, rollouts=sampled(temperature=temperature), loss=loss)
  state, tx = state_of(method)
  batch, _ = method.next_batch(state)
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.mask)
  ours, theirs = (
    np.take_along_axis(f(tokens, temperature), tokens[..., None], -1)[..., 0]
    for f in (student_logp, teacher_logp)
  )
  want = ((ours - theirs) * mask).sum() / mask.sum()
  step = make_step(
    STUDENT, method.loss, tx, scorer=method.score, temperature=method.temperature
  )
  _, metrics = step(state, batch)
  # Two float32 models of log-probs of up to 10 nats.
  assert float(metrics['kl']) == pytest.approx(want, abs=2e-5)
  assert float(metrics['loss']) == pytest.approx(want, abs=2e-5)


def test_supervised_needs_no_teacher_and_reads_the_data(tmp_path):
  options = dict(loss={'objective': 'supervised'}, whose=None, on_policy=0.0)
  method = build(tmp_path, data=texts(), **options)
  assert method.reference is None
  assert not method.asks_policy
  batch, info = method.next_batch(None)
  assert 'data/ids_crc32' in info
  said = {WORDS.decode([t for t in row if t < V]) for row in np.asarray(batch.tokens)}
  assert all('=' in text for text in said)
  method.data.close()


def test_a_coin_of_its_own_decides_each_step(tmp_path):
  method = build(tmp_path, data=texts(), rollouts=sampled(), on_policy=0.3)
  kinds = []
  for step in range(60):
    state, _ = state_of(method, step=step)
    batch, info = method.next_batch(state)
    assert batch.tokens.shape[0] == method.rows == 4
    assert ('reward' in info) == bool(info['on_policy'])
    kinds.append(info['on_policy'])
  again = [np.random.default_rng([0, step]).random() < 0.3 for step in range(60)]
  assert kinds == [float(x) for x in again]
  assert 8 <= sum(kinds) <= 28  # 18 ± 2.8 standard deviations
  method.data.close()


@pytest.mark.parametrize('taken', [1, 3, 5])
def test_a_restart_goes_on_with_the_same_batches(tmp_path, taken):
  def make():
    return build(
      tmp_path, data=texts(2), rollouts=sampled(), on_policy=0.5, minibatches=2
    )

  def steps(method, which):
    batches = []
    for step in which:
      batch, _ = method.next_batch(state_of(method, step=step)[0])
      batches.append(np.asarray(batch.tokens).tolist())
    return batches

  whole = make()
  want = steps(whole, range(8))
  first, second = make(), make()
  got = steps(first, range(taken))
  second.data.set_state(first.data.get_state())
  got += steps(second, range(taken, 8))
  assert got == want
  other = build(tmp_path, rollouts=sampled())
  with pytest.raises(StateMismatch, match='saved with data text'):
    other.data.set_state(first.data.get_state())
  for method in (whole, first, second, other):
    method.data.close()


def test_every_completion_is_written(tmp_path):
  method = build(tmp_path, rollouts=sampled())
  method.next_batch(state_of(method, step=5)[0])
  lines = (tmp_path / 'rollouts' / '000000.jsonl').read_text().splitlines()
  assert len(lines) == 4
  assert {json.loads(line)['step'] for line in lines} == {5}


def test_a_teacher_of_another_vocabulary_is_one_clear_line(tmp_path):
  message = f'algorithm.teacher knows {V + 1} tokens and the student {V}'
  with pytest.raises(ValueError, match=message):
    build(tmp_path, rollouts=sampled(), whose=teacher(V + 1))


SUPERVISED = {'objective': 'supervised'}


@pytest.mark.parametrize(
  ('there', 'options', 'message'),
  [
    ('r', dict(on_policy=1.5), r'algorithm.on_policy=1.5 must be in \[0, 1\]'),
    ('d', dict(on_policy=1.0), 'needs config.rollouts'),
    ('r', dict(on_policy=0.5), 'needs config.data'),
    ('rd', dict(on_policy=0.0), 'samples nothing'),
    ('rd', dict(on_policy=1.0), 'reads no data'),
    ('r', dict(whose=None), "teacher is missing, with loss.objective='jsd'"),
    ('d', dict(on_policy=0.0, loss=SUPERVISED), 'teacher is given'),
    ('r', dict(loss=SUPERVISED, whose=None), 'learns from data; set 0'),
    ('rd', dict(on_policy=0.5, loss={'objective': 'reverse_kl'}), 'own samples alone'),
    ('r', dict(epochs=0), 'epochs=0'),
    ('d', dict(on_policy=0.0, epochs=2), 'are of rollouts'),
    ('r', dict(minibatches=3), 'must be a multiple of minibatches=3'),
    ('rd', dict(on_policy=0.5, minibatches=2), r'steps of \[2, 4\] rows'),
    ('r', dict(loss={'beta': 2.0}), 'config.loss: distillation: beta=2.0'),
  ],
)
def test_bad_input_is_said_before_anything_is_sampled(
  tmp_path, there, options, message
):
  data = texts() if 'd' in there else None
  rollouts = sampled() if 'r' in there else None
  with pytest.raises(ValueError, match=message):
    build(tmp_path, data=data, rollouts=rollouts, **options)
  if data is not None:
    data.close()
