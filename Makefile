PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMP := $(VENV)/.setup-done
TORCH := $(shell grep '^torch==' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format types clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

setup: $(STAMP) ## make .venv with the pinned packages and an editable install

# The order matters. setuptools first: the editable install builds with it, without an isolated environment.
# torch next and alone, by its exact version: a looser requirement may find a build with gigabytes of CUDA beside it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools
	$(PIP) install -q -c constraints.txt $(TORCH)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

demo: setup ## partition two models, the main job of graphsplit
	$(BIN)/graphsplit partition examples/gpt2.py -k 2 -o out/gpt2 --force
	$(BIN)/graphsplit partition examples/resnet50.py -k 2 -o out/resnet50 --force

test: setup ## run the tests, on a part of the zoo that has all its operations
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q -m "not zoo"

test-all: setup ## run the tests on the whole zoo
	$(BIN)/python -m pytest -n 2 --dist loadgroup -q

lint: setup ## check style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: setup ## repair style and format
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

types: setup ## check types
	$(BIN)/python -m mypy

clean: ## remove what was built and all caches, but not .venv
	rm -rf build dist out *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
