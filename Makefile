# Every target sets up what it needs, from a fresh clone on: an own .venv, torch, the build.
#
#   PYTHON=python3.12       which Python the .venv is made of
#   TORCH='torch==2.13.0'   another torch
#   PIP_ARGS=...            for pip, for example --extra-index-url https://download.pytorch.org/whl/cpu:
#                           on Linux the default index serves CUDA wheels, which are much larger
#   BASE=nf4                the demo on a quantized base (nf4, fp4, int8)
#   DEMO_ARGS='--words 640' arguments of examples/pronounce/demo.py
#   JOBS=2                  test processes

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
BASE ?=
DEMO_ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# An editable install sees Python files as they are; only these need a new build.
NATIVE := pyproject.toml $(wildcard CMakeLists.txt setup.py csrc/* csrc/*/* cuda/* cuda/*/*)
PYTHON_CODE := python tests examples benchmarks

.PHONY: help demo demo-setup test test-slow lint format bench gpu-check wheel clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-10s %s\n", $$1, $$2 }'

demo:  ## a real model learns to pronounce English: error rates, speed, memory, checks (minutes)
	@started=$$(date +%s); $(MAKE) --no-print-directory demo-setup && \
	$(BIN)/python examples/pronounce/demo.py --setup-seconds $$(( $$(date +%s) - started )) $(if $(BASE),base=$(BASE)) $(DEMO_ARGS)

demo-setup: $(STAMPS)/demo
	@$(BIN)/python examples/pronounce/fetch.py .cache/smollm2

test: $(STAMPS)/test  ## the tests, without the slow ones
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) -m 'not slow' $(TEST_ARGS)

test-slow: $(STAMPS)/test  ## the slow tests: every shape under emulation, sanitizers, all families
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) -m slow $(TEST_ARGS)

lint: $(STAMPS)/lint  ## ruff, clang-format, mypy
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(STAMPS)/lint  ## put code into the form that lint wants
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

bench: $(STAMPS)/bench  ## one training step and each op, against their peers
	$(BIN)/python benchmarks/train_step.py
	@for bench in $(wildcard benchmarks/ops/bench_*.py); do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

gpu-check:  ## on a machine with a GPU: build, test and measure within BUDGET_S=540 seconds; PARTS=build,tests,ops
	@$(PYTHON) benchmarks/gpu/check.py

wheel: $(STAMPS)/venv  ## source distribution and wheel, in dist/
	$(PIP) build
	$(BIN)/python -m build --outdir dist

clean:  ## remove builds; .venv and .cache stay
	rm -rf build dist $(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench

# -- set-up: a stamp per finished step -----------------------------------------------------------

$(STAMPS)/venv:
	@echo "make: setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@$(PIP) '$(TORCH)'
	@touch $@

# The package itself, with the extra that the stamp is named for.
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench: $(STAMPS)/%: $(STAMPS)/torch $(NATIVE)
	@echo "make: building and installing inlay[$*]"
	@$(PIP) --editable '.[$*]'
	@touch $@

# Pinned: another version formats differently.
$(STAMPS)/lint: $(STAMPS)/torch pyproject.toml
	@$(PIP) ruff==0.17.5 mypy==2.4.1 clang-format==23.1.5 transformers types-PyYAML
	@touch $@
