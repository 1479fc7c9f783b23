# Every target does its own set-up in .venv; `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
PORT ?= 7860
# Whatever the environment says: the tests start hundreds of processes, and each would compile all there is.
export PYTHONDONTWRITEBYTECODE :=
# Most modules are never imported: to compile them all would take as long as to install them.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

# Gradio asks for Pillow below 13, so the other line has an environment of its own.
BIN13 := .venv-pillow13/bin
IMAGE_TESTS := $(wildcard tests/test_codec*.py) \
	$(patsubst %,tests/test_%.py,budget cache corpus encode ingest renditions roundtrip session)

.PHONY: help demo test pillow check bench proof clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo  ## serve the demo page on http://127.0.0.1:7860 (PORT=... for another)
	$(BIN)/async-sessions demo --port $(PORT)

test: .venv/dev  ## run the tests; browser tests are skipped where there is no Chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --cov --cov-report=term:skip-covered --cov-fail-under=93

pillow: .venv/dev .venv-pillow13/test  ## the image tests on Pillow 13, and Pillow's own test images on 12 and 13
	$(BIN13)/python -m pytest -n 4 --dist loadgroup -k "not uvloop" $(IMAGE_TESTS)
	$(BIN13)/python -m pytest -m pillow_images -s tests/test_pillow_images.py
	$(BIN)/python -m pytest -m pillow_images -s tests/test_pillow_images.py

check: .venv/dev  ## lint, format and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/dev  ## measure beside the threaded design and other stores
	$(BIN)/python -m tests.benchmarks

proof: .venv/dev  ## the long proofs, one figure a line
	$(BIN)/python -m tests.proof

clean:  ## remove the environments and what the tools left
	rm -rf .venv .venv-pillow13 .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/python
	$(BIN)/python $(INSTALL) -e '.[demo]'
	@touch $@

# torch first and by number, so that what the other packages ask for does not choose its build.
.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python $(INSTALL) torch==2.13.0
	$(BIN)/python $(INSTALL) -e '.[dev]'
	@touch $@ .venv/demo

.venv-pillow13/test: pyproject.toml
	$(PYTHON) -m venv .venv-pillow13
	$(BIN13)/python $(INSTALL) -e '.[test]' 'pillow>=13'
	@touch $@
