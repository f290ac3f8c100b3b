# From a fresh clone, with Python 3.10 or later, g++ and make: `make demo` or `make test`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
STEPS ?=
# The second environment, for builds with the CUDA engine.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_ARCHITECTURES ?= 8.0;9.0;10.0+PTX

BIN := $(VENV)/bin
# Empty files whose timestamps say when a step was last done.
ENVIRONMENT := $(VENV)/.environment
BUILT := $(VENV)/.built
CXX_SOURCES := $(shell find csrc -type f)
CXX_TESTS := $(shell find tests/native -name '*.cpp' -o -name '*.h')
CXX_SWEEP := $(shell find bench/cuda -name '*.c*' -o -name '*.h')
PACKAGE := $(wildcard gradclip_ext/*.py gradclip_ext/*/*.py gradclip_ext/*.pyi gradclip_ext_autoload.py)
CUDA_PYTHON := $(abspath $(CUDA_VENV))/bin/python
CUDA_ENVIRONMENT := $(CUDA_VENV)/.environment
CUDA_BUILT := $(CUDA_VENV)/.built
CUDA_TEST_TOOLS := $(CUDA_VENV)/.test-tools
# Has no folder named gradclip_ext, which Python would import instead of the installed package.
CUDA_FOLDER := build/cuda
# The third environment, for the frameworks that people train with; with the torch of VENV.
FRAMEWORKS_VENV ?= .venv-frameworks
FRAMEWORKS_PYTHON := $(abspath $(FRAMEWORKS_VENV))/bin/python
FRAMEWORKS_ENVIRONMENT := $(FRAMEWORKS_VENV)/.environment
FRAMEWORKS_BUILT := $(FRAMEWORKS_VENV)/.built
FRAMEWORKS_FOLDER := build/frameworks
# One process for each core; who is done takes over half of what another has left.
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal
# Threads of torch that wait for one another leave the core to the other processes.
PYTEST_SETTINGS := OMP_WAIT_POLICY=passive
define BE_SURE_OF_CUDA_BUILD
import gradclip_ext, sys
from gradclip_ext import _built_with
assert gradclip_ext.__file__.startswith(sys.prefix), gradclip_ext.__file__
assert _built_with.CUDA is not None, _built_with.ENGINES
endef
export BE_SURE_OF_CUDA_BUILD

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build demo test bench cuda kernels sweep frameworks lint types stubs clean FORCE

help:  ## Show this list.
	@echo 'usage: make TARGET [PYTHON=$(PYTHON)] [TORCH=$(TORCH)] [VENV=$(VENV)] [STEPS=n]'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

venv: $(ENVIRONMENT)  ## Create the environment: torch, tools, and an editable gradclip_ext.

build: $(BUILT)  ## Compile what has changed in csrc.

demo: $(BUILT)  ## Train the example model with gradient clipping, for STEPS=n steps if given.
	$(BIN)/python examples/char_rnn.py $(if $(STEPS),--steps $(STEPS))

test: $(BUILT)  ## Run all tests.
	$(PYTEST_SETTINGS) $(BIN)/python -m pytest $(SIDE_BY_SIDE)

bench: $(BUILT)  ## Time clipping against torch's; numbers and plots go to build/bench.
	$(BIN)/python bench/clip.py --output build/bench/clip.json
	$(BIN)/python bench/plot.py build/bench/clip.json
	@$(BIN)/python bench/shortfalls.py build/bench/clip.json

cuda: $(CUDA_BUILT) $(CUDA_TEST_TOOLS)  ## Build with the CUDA engine in CUDA_VENV, and test that build on the CPU.
	cd $(CUDA_FOLDER) && $(CUDA_PYTHON) -c "$$BE_SURE_OF_CUDA_BUILD"
	cd $(CUDA_FOLDER) && $(CUDA_PYTHON) -m gradclip_ext
	cd $(CUDA_FOLDER) && $(PYTEST_SETTINGS) $(CUDA_PYTHON) -m pytest -q $(SIDE_BY_SIDE) \
	  -m 'not install and not sources' $(CURDIR)/tests

kernels: $(CUDA_ENVIRONMENT)  ## Check what nvcc makes of the CUDA kernels, for every architecture.
	$(CUDA_PYTHON) tools/check_kernels.py
	$(CUDA_PYTHON) tools/check_sweep.py

sweep:  ## Compile what compares variants of the CUDA kernels on a GPU; bench/cuda/run.sh runs it.
	bench/cuda/run.sh build/sweep/sweep.csv --dry-run

frameworks: $(FRAMEWORKS_BUILT)  ## Test with Lightning, Accelerate, Transformers and timm in FRAMEWORKS_VENV.
	cd $(FRAMEWORKS_FOLDER) && $(PYTEST_SETTINGS) $(FRAMEWORKS_PYTHON) -m pytest -q \
	  $(CURDIR)/tests/frameworks

lint: $(ENVIRONMENT)  ## Check style and formatting of Python and C++.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) $(CXX_TESTS) $(CXX_SWEEP)

types: $(ENVIRONMENT)  ## Check the types of the package.
	$(BIN)/mypy

stubs: $(BUILT)  ## Check gradclip_ext/_C.pyi against the compiled module.
	$(BIN)/python tools/check_stubs.py

clean:  ## Remove what builds and tools wrote, but not the environment in $(VENV).
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(BUILT) $(CUDA_BUILT) gradclip_ext/_built_with.py gradclip_ext/_C.*.so
	find bench csrc examples gradclip_ext tests tools -name __pycache__ -prune -exec rm -rf {} +

# Rewritten only when TORCH changes, so that another torch updates the environment.
$(VENV)/.torch: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(CUDA_VENV)/.torch: FORCE
	@mkdir -p $(CUDA_VENV)
	@echo '$(CUDA_TORCH)' | cmp -s - $@ || echo '$(CUDA_TORCH)' > $@

$(FRAMEWORKS_VENV)/.torch: FORCE
	@mkdir -p $(FRAMEWORKS_VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

define CREATE_ENVIRONMENT
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo 'Python 3.10 or later is needed, $(PYTHON) is not.'; \
	  echo 'Run: make $(MAKECMDGOALS) PYTHON=python3.x'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo '$(PYTHON) has no venv module. Debian, Ubuntu: apt install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(@D)
endef

$(ENVIRONMENT): pyproject.toml $(VENV)/.torch
	$(CREATE_ENVIRONMENT)
	$(BIN)/python -m pip install '$(TORCH)' 'setuptools>=70.1' ninja pybind11
	$(BIN)/python -m pip install --no-build-isolation -e '.[test,demo,bench,lint]'
	@touch $@

$(BUILT): $(ENVIRONMENT) setup.py tools/build_support.py $(CXX_SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@

$(CUDA_ENVIRONMENT): $(CUDA_VENV)/.torch
	$(PYTHON) tools/find_cuda.py
	$(CREATE_ENVIRONMENT)
	$(CUDA_PYTHON) -m pip install --quiet '$(CUDA_TORCH)' 'setuptools>=70.1' ninja pybind11
	@touch $@

# By itself, so that another list leaves alone what was built.
$(CUDA_TEST_TOOLS): $(CUDA_ENVIRONMENT) pyproject.toml
	$(CUDA_PYTHON) -m pip install --quiet pytest pytest-xdist hypothesis numpy
	@touch $@

# Installed, not built in place, where the extension of the other environment is.
$(CUDA_BUILT): $(CUDA_ENVIRONMENT) setup.py pyproject.toml $(wildcard tools/*.py) $(CXX_SOURCES) \
    $(PACKAGE)
	@mkdir -p $(CUDA_FOLDER)
	@printf '[build]\nbuild_base = $(CUDA_FOLDER)\n' > $(CUDA_FOLDER)/build.cfg
	GRADCLIP_CUDA=1 TORCH_CUDA_ARCH_LIST='$(CUDA_ARCHITECTURES)' \
	  DIST_EXTRA_CONFIG=$(CUDA_FOLDER)/build.cfg $(CUDA_PYTHON) -m pip install \
	  --no-build-isolation --no-deps --no-index --force-reinstall .
	@touch $@

$(FRAMEWORKS_ENVIRONMENT): tests/frameworks/requirements.txt $(FRAMEWORKS_VENV)/.torch
	$(CREATE_ENVIRONMENT)
	$(FRAMEWORKS_PYTHON) -m pip install --quiet '$(TORCH)'
	$(FRAMEWORKS_PYTHON) -m pip install --quiet --no-deps -r tests/frameworks/requirements.txt
	@touch $@

# The wheel is made where all has been compiled for the same torch.
$(FRAMEWORKS_BUILT): $(FRAMEWORKS_ENVIRONMENT) $(BUILT) pyproject.toml $(PACKAGE)
	@rm -rf $(FRAMEWORKS_FOLDER)/wheel
	@mkdir -p $(FRAMEWORKS_FOLDER)
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --no-index \
	  --wheel-dir $(FRAMEWORKS_FOLDER)/wheel .
	$(FRAMEWORKS_PYTHON) -m pip install --quiet --no-deps --no-index --force-reinstall \
	  $(FRAMEWORKS_FOLDER)/wheel/*.whl
	@touch $@
