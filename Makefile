# What people type. Every target sets up .venv first; nothing is installed outside of it.
PYTHON ?= python3
EXTRAS ?= mpi,dev
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FRESH_FLAG := $(if $(FRESH),--fresh)

.DEFAULT_GOAL := help
.PHONY: help install reproduce-fig6 test test-full lint bench bench-link clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-16s %s\n", $$1, $$2 }'

install: $(READY) ## make the virtual environment (done by every other target as needed)

$(READY): pyproject.toml constraints.txt tools/install.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@bash tools/install.sh $(VENV) $(EXTRAS)
	@touch $@

reproduce-fig6: $(READY) ## weak scaling: published, predicted, and measured here (FRESH=1 measures anew)
	@$(BIN)/axonn predict experiments/fig6.yaml $(FRESH_FLAG)
	@status=0; $(BIN)/axonn run experiments/fig6.yaml $(FRESH_FLAG) || status=$$?; \
		test $$status -eq 130 || $(BIN)/python -m plots.fig6 || status=$$?; exit $$status

test: $(READY) ## the tests (3 to 8 minutes on 2 cores)
	@$(BIN)/python -m pytest

test-full: $(READY) ## the tests with the full product of configurations (long)
	@$(BIN)/python -m pytest -m ''

lint: $(READY) ## ruff, and the type checker in strict mode on axonn/
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY) ## timings beside PyTorch's own on this machine: ratios of paired, alternating runs
	@$(BIN)/python -m pytest tests/bench/bench_engine.py --benchmark-enable --timeout 0

bench-link: $(READY) ## the same over an emulated slow link (root only)
	@$(BIN)/python -m tests.bench.link

clean: ## remove results, figures and run folders of this machine, not the environment
	@rm -rf runs plots/out results/measured results/predicted results/fig6
