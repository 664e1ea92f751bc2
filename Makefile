# make quickstart   installs into .venv, then runs the whole pipeline on the embedded example
# make test         installs into .venv, then runs the tests
# make lint         style, types
# make mutants      checks that the tests find out every wrong kernel; make test takes a fifth of them
# make stress       kills training runs at random moments (KILLS=100, SEED=0), ten minutes
#
# PYTHON=python3.12        interpreter of the virtual environment (3.11 or 3.12)
# PIP_ARGS="..."           passed to pip install
# TORCH=keep               use the torch that PYTHON has, and do not pin its version
# DEVICE=cpu               device of quickstart: auto, cpu or cuda
# EXTRAS=data,flash        optional dependencies to install besides
# WORKERS=4                processes that share the tests

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TORCH ?= install
DEVICE ?= auto
EXTRAS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python
comma := ,

ifeq ($(TORCH),keep)
SYSTEM := --system-site-packages
CONSTRAINTS := $(VENV)/constraints.txt
else
SYSTEM :=
CONSTRAINTS := constraints.txt
endif

.PHONY: quickstart test lint stress mutants clean check-python

quickstart: $(VENV)/installed
	$(RUN) -m recipes.quickstart --device $(DEVICE)

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

stress: $(VENV)/installed-dev
	$(RUN) -m pytest --capture=no tests/engine/stress_kills.py

mutants: $(VENV)/installed-dev
	MUTANTS=all $(RUN) -m pytest tests/kernels/test_processes.py -k mutants

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

# Rebuilt when what is to be installed changes; a half-made environment is started afresh.
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
	$(RUN) -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[quickstart,dev,data$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@
