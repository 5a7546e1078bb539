"""What a loss refuses is known without a model, without data, without an array."""

import functools

import pytest

from educe.losses import distillation, dpo, grpo, ppo, reward_model, sft
from educe.losses.dry_run import dry_run, reads


def test_a_loss_that_takes_the_batch_passes():
  dry_run(sft.loss)
  dry_run(functools.partial(sft.loss, label_smoothing=0.1), 'positions', 'segments')
  dry_run(grpo.loss, 'sampler_logp', 'advantages')


@pytest.mark.parametrize(
  ('loss', 'fields', 'message'),
  [
    (functools.partial(sft.loss, aggregate='sequence_mean'), ['segments'], 'packing'),
    (functools.partial(sft.loss, aggregate='constant'), [], 'longest completion'),
    (
      functools.partial(grpo.loss, kl_coef=0.1),
      ['sampler_logp', 'advantages'],
      'reference',
    ),
  ],
)
def test_a_loss_that_does_not_says_so(loss, fields, message):
  with pytest.raises(ValueError, match=message):
    dry_run(loss, *fields)


def test_only_the_named_fields_are_there():
  seen = []

  def loss(scores, batch):
    seen.append({n for n, x in batch._asdict().items() if x is not None})
    return grpo.loss(scores, batch)

  dry_run(loss, 'advantages', 'ref_logp')
  assert seen == [{'tokens', 'mask', 'advantages', 'ref_logp'}]


def test_labels_are_one_a_row():
  def loss(scores, batch):
    assert batch.labels.shape == batch.mask.shape[:1]
    return sft.loss(scores, batch)

  dry_run(loss, 'labels')


def test_who_reads_values_and_who_log_probs():
  objective = functools.partial
  for loss in (
    ppo.loss,
    *(objective(reward_model.loss, objective=x) for x in reward_model.OBJECTIVES),
  ):
    assert reads(loss, 'values')
  for loss in (
    sft.loss,
    grpo.loss,
    dpo.loss,
    objective(dpo.loss, variant='kto'),
    *(objective(distillation.loss, objective=x) for x in distillation.OBJECTIVES),
  ):
    assert not reads(loss, 'values')
    assert reads(loss, 'logp', 'entropy', 'mean_logp', 'divergence')
  assert reads(ppo.loss, 'logp')
  assert not reads(reward_model.loss, 'logp', 'entropy', 'mean_logp', 'divergence')
