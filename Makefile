# Every target builds its own virtual environment in .venv on first use: nothing else needs to be installed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
GPU_PYTHON ?= $(BIN)/python
# The workers share the cores, so each one computes on a single thread; one that runs out of tests takes another's.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
TYPECHECK := .cache/typecheck

# A failure anywhere in a pipe fails the target.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

.PHONY: help demo test test-matrix test-families test-libraries test-full test-slow test-mutations lint format bench eval eval-quick bench-gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo ">> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo ">> installing avl-fx and its development tools (the first time takes minutes: torch is large)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## a small vision-language model, before and after, on this machine
	$(BIN)/python -m examples.demo

test: $(STAMP)  ## the tests that every change must pass
	$(PYTEST) -m "not matrix and not families and not libraries and not full and not slow and not gpu"

test-matrix: $(STAMP)  ## every combination of model, front door, style, cache and dtype, without code generation
	$(PYTEST) -m matrix

test-families: $(STAMP)  ## every architecture of docs/models.md answers what that page says
	$(PYTEST) -m families

test-libraries: $(STAMP)  ## beside peft, torchao, bitsandbytes, compressed-tensors and accelerate, which it installs
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[libraries]'
	$(PYTEST) -m libraries

test-full: $(STAMP)  ## every other combination through Inductor (hours)
	$(PYTEST) -m full

test-slow: $(STAMP)  ## tests that take minutes or download data
	$(PYTEST) -m "slow and not gpu"

test-mutations: $(STAMP)  ## plant wrong rewrites: the suite must notice each of them
	$(BIN)/python -m tests.mutations

# passes/ and kernels/ are installed inside the package, so mypy reads a tree of links in which they stand there. It is
# made anew each time, and the paths that mypy reports are turned back into those of the repository.
lint: $(STAMP)  ## style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/avl_fx
	@ln -s $(CURDIR)/avl_fx/* $(CURDIR)/passes $(CURDIR)/kernels $(TYPECHECK)/avl_fx/
	@echo ">> mypy"
	@cd $(TYPECHECK) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	    -p avl_fx | sed -e 's#^avl_fx/passes/#passes/#' -e 's#^avl_fx/kernels/#kernels/#'

format: $(STAMP)  ## put the code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## ratios against compiled baselines, measured in the same run
	$(BIN)/python -m benchmarks.run

eval: $(STAMP)  ## what the methods cost a trained model in answers, against every control (hours)
	$(BIN)/python -m benchmarks.eval

eval-quick: $(STAMP)  ## the same on a few pictures: minutes
	$(BIN)/python -m benchmarks.eval --quick --output out/eval-quick

# On a GPU machine without network: `make bench-gpu GPU_PYTHON=python3`, whatever environment that is.
bench-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))  ## the tests that need a GPU, and 7B shapes against compiled baselines
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

clean:  ## remove everything that the other targets made, except $(VENV)
	rm -rf $(TYPECHECK) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
