# Needs Python 3.11 or newer, make and a C++ compiler. The first target creates .venv with all dependencies.
#   make demo    extend a small model fourfold and plot the result (8 to 14 minutes on 2 CPU cores)
#   make test    run every CPU test
#   make lint    check style and types
#   make mutants plant faults in copies of the core, which the tests must notice (15 minutes on 2 CPU cores)
#   make clean   delete the virtual environment and all outputs

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# for the deepspeed launcher, and ninja, which compiles its operators
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test lint mutants clean

demo: $(READY)
	$(VENV)/bin/python script/demo/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile -m "not gpu and not slow"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

mutants: $(READY)
	$(VENV)/bin/python -m tests.mutants

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set one with make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --requirement requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) output
