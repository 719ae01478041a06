# nybble: every command works on a fresh clone; the virtual environment is made on first use.
PYTHON ?= python3
# Which torch to install, as pip takes it. On Linux the wheel of pip's default index brings CUDA libraries along and runs
# on a CPU too; TORCH=torch takes the newest version.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two test processes by default, one thread each: more only fight for the cores.
TEST_PROCESSES ?= 2
# What `make bench-gpu` runs, on what, and where it leaves the results.
NYBBLE ?= $(BIN)/nybble
SHAPE ?= qwen2.5-32b-awq
RESULTS ?= bench/results
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test check test-gpu bench-gpu format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(INSTALLED)  ## answer a few prompts with the embedded model
	@$(BIN)/nybble demo

test: $(INSTALLED)  ## the whole test suite that runs on a CPU
	$(PYTEST) -n $(TEST_PROCESSES)

check: $(INSTALLED)  ## format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -n $(TEST_PROCESSES) -m "not slow and not gpu"

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench-gpu:  ## measure kernels, steps and decoding of SHAPE on a GPU, and explain them; needs nybble installed
	mkdir -p $(RESULTS)
	$(NYBBLE) bench kernels --synthetic $(SHAPE) -o $(RESULTS)/kernels-$(SHAPE).json
	$(NYBBLE) bench step --synthetic $(SHAPE) --batch-sizes 1,4,16,64 -o $(RESULTS)/step-$(SHAPE).json
	$(NYBBLE) bench latency --synthetic $(SHAPE) --batch-sizes 1,4,8,16,32,64,128 --max-num-seqs 128 \
		-o $(RESULTS)/latency-$(SHAPE)-fp16.json
	$(NYBBLE) bench latency --synthetic $(SHAPE) --batch-sizes 1,4,8,16 --max-num-seqs 128 --dtype bfloat16 \
		-o $(RESULTS)/latency-$(SHAPE)-bf16.json
	$(NYBBLE) profile --synthetic $(SHAPE) --batch-sizes 1,4,16,64 --explain --trace --out $(RESULTS)/profile-$(SHAPE)

format: $(INSTALLED)  ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nybble needs Python 3.11 or newer; say PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@
