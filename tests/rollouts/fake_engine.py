"""An engine as vLLM and SGLang are to clients: it samples from a folder of weights."""

import json
import threading

import jax
import numpy as np

from educe.data import tokenizer as tokenizers
from educe.models import safetensors
from educe.rollouts.sampler import sample


class Engine:
  """Answers of `listen` (tests/conftest.py).

  asked: bodies of completions · told: (path, folder) of reloads · answer: a function of
  (body, the honest answer) that may send something else
  """

  def __init__(self, folder=None, name='policy', answer=None):
    self.name, self.answer = name, answer
    self.asked, self.told, self.served = [], [], []
    self.lock, self.stale = threading.Lock(), False
    if folder is not None:
      self.load(folder)

  def load(self, folder):
    self.model, self.params = safetensors.load(path=str(folder))
    self.words = tokenizers.load(path=str(folder))
    self.folder = str(folder)

  def __call__(self, path, body, headers):
    with self.lock:
      if path == '/v1/completions':
        return self.complete(body)
      if path == '/reset_prefix_cache':
        self.stale = False
        return 200, {}, b''  # as vLLM answers
      if path == '/collective_rpc' and body['method'] == 'reload_weights':
        folder, self.stale = body['kwargs']['weights_path'], True
      elif path == '/update_weights_from_disk':
        folder = body['model_path']
      else:
        return 404, {}, b'Not Found'
      self.told.append((path, folder))
      try:
        self.load(folder)
      except (ValueError, OSError) as error:
        return 400, {}, json.dumps({'success': False, 'message': str(error)}).encode()
      return {'success': True, 'results': [None]}

  def complete(self, body):
    assert not self.stale, 'prefixes of the old weights are kept'
    self.asked.append(body)
    self.served.append(self.folder)
    if body['model'] != self.name:
      return 404, {}, b'{"error": {"message": "The model does not exist."}}'
    drawn = sample(
      self.model,
      self.params,
      [body['prompt']],
      jax.random.key(0),
      max_new_tokens=body['max_tokens'],
      temperature=body['temperature'],
      eos_ids=body['stop_token_ids'],
      seeds=[body['seed']],
    )
    length = int(drawn.length[0])
    choice = {
      'index': 0,
      'text': self.words.decode(drawn.tokens[0, :length].tolist(), skip_special=True),
      'finish_reason': 'stop' if drawn.stopped[0] else 'length',
      'token_ids': drawn.tokens[0, :length].tolist(),
      'prompt_token_ids': body['prompt'],
      'logprobs': {'token_logprobs': np.float64(drawn.logp[0, :length]).tolist()},
    }
    honest = {'model': self.name, 'choices': [choice]}
    return honest if self.answer is None else self.answer(body, honest)
