# make demo [WORKDIR=DIR]   a run on built-in scenes: pictures and figures in a few minutes
# make test                 the tests
# make faults               injects every fault, then trains for two hours, and prints what happened
# make lint                 ruff
# make docs                 guides and reference as pages in docs/_build; a warning is an error
# make notebooks            launch/colab/*.ipynb from their text forms
# The first call of any of them makes .venv and installs the package into it.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
WORKDIR ?= demo
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test faults lint docs notebooks
demo: $(VENV)/.installed
	$(RUN) -m salcl_jax.main --config=configs/scenes.py --workdir=$(WORKDIR)

test: $(VENV)/.tests-installed
	$(RUN) -m pytest -n 2 --dist loadgroup

faults: export FAULT_TABLE = $(abspath $(VENV)/faults.jsonl)
faults: $(VENV)/.tests-installed
	@rm -f $(FAULT_TABLE)
	$(RUN) -m pytest -m fault -n 2 --dist loadgroup; code=$$?; $(RUN) -m pytest -m long || code=$$?; \
		$(RUN) tests/print_faults.py $(FAULT_TABLE); exit $$code

lint: $(VENV)/.tests-installed
	$(RUN) -m ruff check .

docs: $(VENV)/.docs-installed
	$(RUN) -m sphinx -q -W --keep-going docs docs/_build
	@echo docs/_build/index.html

notebooks: $(VENV)/.tests-installed
	$(RUN) launch/colab/build.py

$(VENV)/.installed: setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found (tensorflow has wheels for these); name one with PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -e .
	touch $@

$(VENV)/.tests-installed: $(VENV)/.installed
	$(RUN) -m pip install --quiet -e .[test]
	touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(RUN) -m pip install --quiet -e .[docs]
	touch $@
