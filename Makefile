# Everything happens in a virtual environment in .venv, made and filled when it is needed: nothing but Python, make and
# the package index is asked for. `make PYTHON=python3.12 ...` after a `make clean` takes another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD := $(VENV)/peers/gsocketpool-0.1.6

# A few processes, each with servers of its own: tests/conftest.py says how many.
SIDE_BY_SIDE := --numprocesses=auto --dist=worksteal

# Which tests `make test` runs; all of them, if nothing is said.
TESTS :=

PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.PHONY: help demo test coverage check docs bench faults soak peers format clean
.NOTPARALLEL:

help:
	@echo "make demo      a pool of ten at work, for five seconds"
	@echo "make test      the whole test suite"
	@echo "make coverage  the same, and what of the package it runs, by branches"
	@echo "make check     ruff and mypy"
	@echo "make format    let ruff mend what it can"
	@echo "make docs      the manual, in docs/_build/html"
	@echo "make bench     all pools side by side"
	@echo "make faults    what each fault costs, in front of real servers, written into the docs"
	@echo "make soak      a month of a service: a million borrowings, in about two minutes"
	@echo "make clean     remove whatever these made"

demo: $(VENV)/.demo
	@$(BIN)/python -m gsocketpool

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(TESTS)

coverage: $(VENV)/.test
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --cov --cov-report=term

check: $(VENV)/.check
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: $(VENV)/.check
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

docs: $(VENV)/.docs
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html
	@echo "see docs/_build/html/index.html"

bench: peers
	@$(BIN)/python -m benchmarks

faults: $(VENV)/.test
	@GSOCKETPOOL_FAULTS=write $(BIN)/python -m pytest tests/conformance/test_faults.py

soak: $(VENV)/.test
	@$(BIN)/python -m tests.soak

# The pools that the benchmarks measure beside this one.
peers: $(VENV)/.bench

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find gsocketpool tests benchmarks docs examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# One stamp for each set of dependencies, older than pyproject.toml once that has changed.

$(VENV)/.demo: EXTRA := demo
$(VENV)/.test: EXTRA := test
$(VENV)/.check: EXTRA := check
$(VENV)/.docs: EXTRA := docs
$(VENV)/.bench: EXTRA := bench

$(VENV)/.demo $(VENV)/.test $(VENV)/.check $(VENV)/.docs: $(VENV)/.made pyproject.toml
	@echo "installing what $(@:$(VENV)/.%=make %) needs ..."
	@$(PIP) install --prefer-binary --editable '.[$(EXTRA)]'
	@touch $@

# gsocketpool 0.1.6 has our name, so it goes into a folder of its own.
$(VENV)/.bench: $(VENV)/.made pyproject.toml
	@echo "installing what make bench needs ..."
	@$(PIP) install --prefer-binary --editable '.[$(EXTRA)]'
	@rm -rf $(OLD)
	@$(PIP) install --no-deps --no-binary :all: --target $(OLD) gsocketpool==0.1.6
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info < (3, 10) and sys.exit(f"gsocketpool needs Python 3.10 or newer, and $(PYTHON) is {v}: name another one with make PYTHON=...")'
	@echo "making a virtual environment in $(VENV) ..."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@
