# make quickstart: the whole method on real text, in minutes. make test: the tests. make check: style, types, tests.
PYTHON ?= python3
BIN := .venv/bin
# Where this is set, every process would compile torch, transformers and lightning again: 9 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart install test unit static check format clean

quickstart: install
	$(BIN)/python -m tools.e2e.quickstart

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Interprets the GPU's kernel for a test; apart, since other packages would use it wherever they find it.
.triton: Makefile
	rm -rf $@
	-$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps --target $@ triton==3.9.0
	touch $@

test: install .triton
	$(BIN)/python -m pytest

unit: install
	$(BIN)/python -m pytest tests/unit

static: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

check: static test

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .triton runs
