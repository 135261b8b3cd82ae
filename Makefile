PYTHON ?= python3
export FASTPRUNE_BUILD ?= auto

VENV := .venv
BIN := $(VENV)/bin
# --no-compile: most installed modules are never imported here; Python compiles the others on use.
PIP := $(BIN)/python -m pip install -q --no-compile -c constraints.txt
INSTALLED := $(VENV)/.installed
BUILT := build/.built-$(FASTPRUNE_BUILD)
CXX_FILES = $(shell find csrc bench tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-training test-rest test-triton lint format bench evidence clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(BUILT) ## create .venv, install the pinned packages, build the native libraries
	@:

# FASTPRUNE_BUILD=0: pip would hide the build's messages; the next rule shows them.
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastprune needs Python 3.11 or newer: make PYTHON=python3.x")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing build tools"
	@$(PIP) setuptools wheel ninja pybind11
	@echo "installing torch and the other pinned packages (minutes, the first time)"
	@FASTPRUNE_BUILD=0 $(PIP) --no-build-isolation -e '.[all,dev]'
	@touch $@

# Folders are listed too, so a deleted file counts as a change. Without a CPU library (no compiler)
# there is no stamp: the next call tries again and says again what is missing.
$(BUILT): $(INSTALLED) setup.py $(shell find csrc)
	@echo "building the native libraries"
	@$(BIN)/python setup.py -q build_ext --inplace
	@mkdir -p build
	@if [ -e fastprune/_cpu.so ] || [ $(FASTPRUNE_BUILD) = 0 ]; then touch $@; fi

demo: setup ## prune a small network and report what it bought
	@$(BIN)/fastprune demo

# In parallel, each part's output in one piece.
test: setup ## run the tests
	@$(MAKE) -j2 --output-sync=target test-training test-rest test-triton

test-training: setup
	$(BIN)/python -m pytest tests/csrc tests/optim

test-rest: setup
	$(BIN)/python -m pytest --ignore tests/csrc --ignore tests/optim

# Triton reads TRITON_INTERPRET when it is imported: hence a process of its own.
test-triton: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton

lint: $(INSTALLED) ## check style, types and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(INSTALLED) ## format Python and C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup ## measure against the rivals
	$(BIN)/python -m bench.run
	$(BIN)/python -m pytest bench/test_micro.py

evidence: setup ## run the long experiments behind each claim
	$(BIN)/python -m bench.evidence

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info fastprune/*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
