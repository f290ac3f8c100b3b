# From a fresh clone, with Python 3.10 or later, g++ and make: `make demo` or `make test`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
STEPS ?=

BIN := $(VENV)/bin
# Empty files whose time tells when a step was last done.
ENVIRONMENT := $(VENV)/.environment
BUILT := $(VENV)/.built
CXX_SOURCES := $(shell find csrc -type f)
CXX_TESTS := $(wildcard tests/native/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build demo test bench lint types stubs clean FORCE

help:  ## Show this list.
	@echo 'usage: make TARGET [PYTHON=$(PYTHON)] [TORCH=$(TORCH)] [VENV=$(VENV)] [STEPS=n]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(ENVIRONMENT)  ## Create the environment: torch, tools, and gradclip_ext as editable install.

build: $(BUILT)  ## Compile what has changed in csrc.

demo: $(BUILT)  ## Train the example model with gradient clipping; STEPS=n sets for how long.
	$(BIN)/python examples/char_rnn.py $(if $(STEPS),--steps $(STEPS))

test: $(BUILT)  ## Run all tests.
	$(BIN)/python -m pytest

bench: $(BUILT)  ## Time clipping beside torch's; numbers and plots go to build/bench.
	$(BIN)/python bench/bench_clip.py --output build/bench/clip.json
	$(BIN)/python bench/plot.py build/bench/clip.json

lint: $(ENVIRONMENT)  ## Check style and formatting of Python and C++.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) $(CXX_TESTS)

types: $(ENVIRONMENT)  ## Check the types of the package.
	$(BIN)/mypy

stubs: $(BUILT)  ## Check gradclip_ext/_C.pyi against the compiled module.
	$(BIN)/python tools/check_stubs.py

clean:  ## Remove what builds and tools wrote; the environment in $(VENV) stays.
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(BUILT) gradclip_ext/_built_with.py gradclip_ext/_C.*.so
	find bench csrc examples gradclip_ext tests tools -name __pycache__ -prune -exec rm -rf {} +

# Written anew only when TORCH changes, so that another torch updates the environment.
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(ENVIRONMENT): pyproject.toml $(VENV)/.torch
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo 'Python 3.10 or later is needed, $(PYTHON) is not.'; \
	  echo 'Run: make $(MAKECMDGOALS) PYTHON=python3.x'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) has no venv module. Debian, Ubuntu: apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)' 'setuptools>=70.1' ninja pybind11
	$(BIN)/python -m pip install --no-build-isolation -e '.[test,demo,bench,lint]'
	@touch $@

$(BUILT): $(ENVIRONMENT) setup.py tools/build_support.py $(CXX_SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@
