# Every target does its own set-up in .venv; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 7860

.PHONY: help demo test check bench proof clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo  ## serve the demo page on http://127.0.0.1:7860 (PORT=... for another)
	$(BIN)/async-sessions demo --port $(PORT)

test: .venv/dev  ## run the tests; browser tests are skipped where there is no Chromium
	$(BIN)/python -m pytest -n 4 --cov --cov-report=term:skip-covered --cov-fail-under=93

check: .venv/dev  ## lint, format and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/dev  ## measure beside the threaded design and other stores
	$(BIN)/python -m tests.benchmarks

proof: .venv/dev  ## the long proofs, one figure a line
	$(BIN)/python -m tests.proof

clean:  ## remove .venv and what the tools left
	rm -rf .venv .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/demo
