"""educe: post-training of language models in JAX, and a measure of what it did."""

import setuptools

DEMO = ['matplotlib>=3.9', 'math-verify>=0.9.0', 'reasoning-gym>=0.1.25']

setuptools.setup(
  name='educe',
  version='0.1.0',
  description='LLM post-training research in JAX: train, then measure what changed',
  license='Apache-2.0',
  python_requires='>=3.11',
  package_dir={'': 'src'},
  packages=setuptools.find_packages('src'),
  package_data={'educe.measurement': ['*.mplstyle']},
  install_requires=[
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'grain>=0.2.18',
    'tensorflow-datasets>=4.9.10',
    'importlib-resources>=6.0',  # tensorflow-datasets imports it without declaring it
    'ml-collections>=1.1.0',
    'absl-py>=2.1',
    'cloudpickle>=3.1',
    'gguf>=0.19',
    'jaxtyping>=0.3.7',
    'jinja2>=3.1.6',
    'numpy>=2.0',
    'scipy>=1.13',
    'safetensors>=0.8',
    'tokenizers>=0.23',
    'tqdm>=4.67',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10.2'],
    'cuda': ['jax[cuda13]>=0.10.2'],
    'demo': DEMO,
    'notebook': [*DEMO, 'jupyterlab>=4.4', 'nbclient>=0.10'],
    'dev': [
      *DEMO,
      'beartype>=0.22',
      'jsonschema>=4.23',
      # Compiles for TPUs where there is none; jax names the libtpu that it can talk to.
      "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",
      'mypy>=1.18',
      'pytest>=9.0',
      'pytest-xdist>=3.8',
      'pyyaml>=6.0',
      'ruff>=0.14',
      'tensorboardX>=2.6',
    ],
  },
)
