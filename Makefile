# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SOURCES := $(wildcard toolkit/ops/*/cpu.cpp toolkit/ops/native/*.h toolkit/ops/activation/kinds/*.py \
	toolkit/ops/attention/modifiers/*.py)

.PHONY: demo test lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	@echo "== setting up $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt pip setuptools wheel torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'from toolkit.ops import native; print("== native CPU kernels:", native.load() or "none, reference serves")'
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

demo: $(STAMP)
	@$(BIN)/toolkit demo

clean:
	rm -rf $(VENV) build *.egg-info
	find . -name '*.so' -path './toolkit/*' -delete
