# Everything runs inside .venv, made from requirements.lock and requirements-dev.lock. Knobs:
#   make compare PYTHON=python3.12            another interpreter (3.11 or newer)
#   make compare PIP_ARGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
#                                             pip's own options; without them Linux gets the CUDA build of torch
#   make compare JOBS=1                       stages side by side at most (default: what has room)
#   make test DEVICE=cuda WORKERS=12          where the tests compute, and how many at a time (default: cpu, 2)
PYTHON ?= python3
PIP_ARGS ?=
JOBS ?=
DEVICE ?= cpu
WORKERS ?= 2
VENV := .venv
READY := $(VENV)/ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := compare
.PHONY: help bench bench-device bench-orchestration compare test test-all test-numerics test-runners runners lint types format setup docs vendor clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 22

compare: $(READY) ## run what params.yaml says, print its scores and the report's path (JOBS=1: one stage at a time)
	prunequant run $(if $(JOBS),--jobs $(JOBS))

PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --device $(DEVICE)

test: $(READY) ## the tests without the drills
	$(PYTEST) -m "not drill"
	$(if $(filter cpu,$(DEVICE)),$(MAKE) test-numerics)

test-all: $(READY) ## all tests
	$(PYTEST)
	$(if $(filter cpu,$(DEVICE)),$(MAKE) test-numerics)

# Spread runs and nights on real servers; needs PostgreSQL's postgres and initdb on the path.
test-runners: runners ## the drills of shared servers; needs PostgreSQL
	python -m pytest tests/flows/test_spread.py tests/test_deploy.py --durations=0

# What workers need to reach an S3 store, into .venv.
runners: $(READY) ## add what workers need to reach an S3 store
	python -m pip install $(PIP_ARGS) -r requirements-runners.lock

# The kernels of an old CPU: BLAS and LAPACK, oneDNN, torch's own. Their sums differ in the last bits.
test-numerics: $(READY) ## tests of floating-point kernels on those of an old CPU
	MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default $(PYTEST) -m numerics

lint: $(READY) ## ruff
	ruff check .
	ruff format --check .

types: $(READY) ## mypy
	mypy

format: $(READY) ## rewrite the code as ruff formats it
	ruff check --fix .
	ruff format .

setup: $(READY) ## make .venv from the locked versions

$(READY): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install $(PIP_ARGS) -r requirements.lock -r requirements-dev.lock
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# llm-compressor, which the benchmark compares with, pins other versions than ours.
bench: $(READY) .venv-llmcompressor/ready ## compression beside llm-compressor
	dvc repro model@smollm2 dataset@news dataset@speeches
	python -m benchmarks.compression
	python -m benchmarks.memory

.venv-llmcompressor/ready: benchmarks/requirements-llmcompressor.lock
	$(PYTHON) -m venv .venv-llmcompressor
	.venv-llmcompressor/bin/python -m pip install $(PIP_ARGS) -r benchmarks/requirements-llmcompressor.lock
	@touch $@

# Parity with the CPU, repeats, kills and speed on a GPU; without a GPU it says so.
bench-device: $(READY) ## a GPU beside the CPU
	python -m benchmarks.device

# Snakemake, which the benchmark of orchestration compares with, has an environment of its own.
bench-orchestration: $(READY) .venv-snakemake/ready ## the flow beside Snakemake
	python -m benchmarks.orchestration --snakemake .venv-snakemake/bin/snakemake

.venv-snakemake/ready: benchmarks/requirements-snakemake.lock
	$(PYTHON) -m venv .venv-snakemake
	.venv-snakemake/bin/python -m pip install $(PIP_ARGS) -r benchmarks/requirements-snakemake.lock
	@touch $@

# The site has an environment of its own; its generator reads the code without importing it.
docs: .venv-docs/ready ## the documentation as a site, site/index.html
	.venv-docs/bin/zensical build --strict

.venv-docs/ready: requirements-docs.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install $(PIP_ARGS) -r requirements-docs.lock
	@touch $@

vendor: $(READY) ## bring the libraries of the report, of `dvc plots show` and of the site from npm, pinned
	python deploy/vendor.py

clean: ## remove the environments and the tools' caches
	rm -rf $(VENV) .venv-llmcompressor .venv-snakemake .venv-docs site .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
