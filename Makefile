# make quickstart   installs into .venv, then runs the whole pipeline on the embedded example
# make test         installs into .venv, then runs the tests: without kernels, then the kernels in Triton's interpreter
# make test-all     all tests, also the slow tests, offline compilation for every chip, and mutants of every kernel
# make lint         style, types, and that texts and generated pages are up to date
# make mutants      checks that the kernels' tests fail on every wrong version of a kernel (MUTANTS="rms_norm --all")
# make stress       kills training runs at random moments (KILLS=100, SEED=0), ten minutes
#
# PYTHON=python3.12        interpreter of the virtual environment (3.11 or 3.12)
# PIP_ARGS="..."           passed to pip install
# TORCH=keep               use the torch that PYTHON has, and do not pin its version
# DEVICE=cpu               device of quickstart: auto, cpu or cuda
# EXTRAS=data,flash        optional dependencies to install besides
# WORKERS=4                processes that share the tests (default: 2)

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TORCH ?= install
DEVICE ?= auto
EXTRAS ?=
WORKERS ?= 2
PYTEST_ARGS ?=
MUTANTS ?=

RUN := $(VENV)/bin/python
comma := ,

ifeq ($(TORCH),keep)
SYSTEM := --system-site-packages
CONSTRAINTS := $(VENV)/constraints.txt
else
SYSTEM :=
CONSTRAINTS := constraints.txt
endif

.PHONY: quickstart test test-all lint stress mutants clean check-python

quickstart: $(VENV)/installed
	$(RUN) -m recipes.quickstart --device $(DEVICE)

# The tests that run kernels; with TRITON_INTERPRET=1 they run again in Triton's interpreter.
KERNEL_TESTS := tests/kernels tests/model/test_recompute.py
PYTEST := $(RUN) -m pytest -n $(WORKERS)

test: $(VENV)/installed-dev
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow and not lint" $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m "kernels and not gpu and not slow" $(KERNEL_TESTS) $(PYTEST_ARGS)

test-all: $(VENV)/installed-dev
	$(PYTEST) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PYTEST) -m "kernels and not gpu" $(KERNEL_TESTS) $(PYTEST_ARGS)
	$(RUN) -m tests.kernels.mutation.run --jobs $(WORKERS) $(MUTANTS)

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m benchmarks.report --check
	$(RUN) -m pytest -q -m lint

stress: $(VENV)/installed-dev
	$(RUN) -m pytest --capture=no tests/engine/stress_kills.py

mutants: $(VENV)/installed-dev
	$(RUN) -m tests.kernels.mutation.run --jobs $(WORKERS) $(MUTANTS)

clean:
	rm -rf $(VENV) build *.egg-info

check-python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else \
	"Komainu needs Python 3.11 or 3.12, $(PYTHON) is %d.%d: name another one, make ... PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	{ echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }
ifeq ($(TORCH),keep)
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "TORCH=keep, but $(PYTHON) has no torch" >&2; exit 1; }
endif

# A change of the required packages installs them again; a half-made environment is made anew.
$(VENV)/python: | check-python
	rm -rf $(VENV)
	$(PYTHON) -m venv $(SYSTEM) $(VENV)
ifeq ($(TORCH),keep)
	@$(RUN) -c 'import torch' 2>/dev/null || { echo "TORCH=keep: a new environment does not see the torch of $(PYTHON), \
	which is in a virtual environment itself; name the interpreter that torch is installed for" >&2; exit 1; }
endif
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/python
ifeq ($(TORCH),keep)
	grep -v '^torch==' constraints.txt > $(CONSTRAINTS)
endif
	$(RUN) -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[quickstart$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN) -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[quickstart,dev,data,eval$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@
