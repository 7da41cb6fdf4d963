# What people type. Every target sets up .venv first; nothing is installed outside of it.
PYTHON ?= python3
EXTRAS ?= mpi,dev
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# FRESH=busy: of what is measured, that which was while the machine was busy with other work.
FRESH_FLAG := $(if $(FRESH),--fresh)
FRESH_RUN_FLAG := $(if $(filter busy,$(FRESH)),--fresh-busy,$(FRESH_FLAG))
BUSY_FLAG := $(if $(BUSY),--with-busy)
DEVICE_FLAG := $(if $(DEVICE),--device $(DEVICE))
QUICK_FLAG := $(if $(QUICK),--quick)
GPU_RESULTS := results/gpu$(if $(filter cpu,$(DEVICE)),/cpu)$(if $(QUICK),/quick)
COMPARISON := results/baselines$(if $(QUICK),/quick)$(if $(LINK),/link)

# The poster's figures, and the papers' other experiments, in the order in which `make reproduce` makes them.
FIGURES := fig3 fig5 fig6 fig7
OTHERS := ginter inflight memory messages loss

.DEFAULT_GOAL := help
# What is measured has the cores to itself.
.NOTPARALLEL:
.PHONY: help install reproduce reproduce-others $(FIGURES:%=reproduce-%) $(OTHERS:%=reproduce-%) report schematics \
	baselines compare-baselines clean-baselines calibrate validate-local validate-plan validate-published plan-published \
	docs test test-full test-pages test-isa test-slurm soak faults lint bench bench-link bench-tensor bench-schedules bench-optimizer bench-gpu clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-21s %s\n", $$1, $$2 }'

install: $(READY) ## make the virtual environment (done by every other target as needed)

$(READY): pyproject.toml constraints.txt tools/install.sh tools/torch.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@bash tools/install.sh $(VENV) $(EXTRAS)
	@touch $@

reproduce: $(READY) ## all figures, the model against published sets, and results/report.html (FRESH=1: all anew; FRESH=busy: what a busy machine measured)
	@$(BIN)/python -m plots.reproduce $(FIGURES:%=reproduce-%) $(OTHERS:%=reproduce-%) schematics validate-published

report: $(READY) ## results/report.html alone, from what is there
	@$(BIN)/python -m plots.report

reproduce-fig3: ## what a batch is made of, without and with the memory optimisation: published, predicted, measured here
reproduce-fig5: ## the trace of tensor parallelism: predicted, and measured here, with Perfetto traces
reproduce-fig6: ## weak scaling: published, predicted, and measured here (FRESH=1 measures anew, FRESH=busy what a busy machine measured; BUSY=1: that in ratios, too; DEVICE=cuda on GPUs)
reproduce-fig7: ## weak scaling of U-Nets: our tensor parallelism and Megatron-LM's scheme
reproduce-ginter: ## pipeline phase over G_inter: published, predicted
reproduce-inflight: ## in-flight limit of the message-driven schedule beside 1F1B: predicted, and measured here
reproduce-memory: ## the memory optimisation: published, predicted, and measured here
reproduce-messages: ## MPI and NCCL, published; messages of this machine (calibrates it quickly where that was not done)
reproduce-messages: experiments/machines/local.yaml
reproduce-loss: ## training loss on a grid and on one rank, measured here; published curves
reproduce-others: $(OTHERS:%=reproduce-%) ## these five

# Only where there is none: whatever was measured by hand stays.
experiments/machines/local.yaml: | $(READY)
	@$(BIN)/axonn calibrate --quick

$(FIGURES:%=reproduce-%) $(OTHERS:%=reproduce-%): reproduce-%: $(READY)
	@$(BIN)/axonn predict experiments/$*.yaml $(if $(filter-out busy,$(FRESH)),--fresh)
	@status=0; $(BIN)/axonn run experiments/$*.yaml $(FRESH_RUN_FLAG) $(DEVICE_FLAG) || status=$$?; \
		test $$status -eq 130 || $(BIN)/python -m plots.figures.$* $(FRESH_FLAG) $(BUSY_FLAG) || status=$$?; exit $$status

compare-baselines: $(READY) ## AxoNN and other frameworks on the same work (QUICK=1; LINK=1; RANKS=4; OPTIONS='--kinds tensor')
	@status=0; $(BIN)/python -m baselines.compare --out $(COMPARISON) $(QUICK_FLAG) $(if $(LINK),--link) $(if $(RANKS),--ranks $(RANKS)) $(DEVICE_FLAG) $(OPTIONS) || status=$$?; \
		test $$status -gt 1 || $(BIN)/python -m plots.figures.baselines $(COMPARISON)/summary.json || status=$$?; exit $$status

schematics: $(READY) ## the grid, the schedule and a layer of a configuration as pictures (CONFIG=my.yaml)
	@$(BIN)/python -m plots.figures.schematics $(CONFIG)

calibrate: $(READY) ## measure this machine for the performance model (QUICK=1: coarsely; DEVICE=cuda: its GPU)
	@$(BIN)/axonn calibrate $(QUICK_FLAG) $(DEVICE_FLAG)

validate-published: $(READY) ## the model against all published sets (axonn predict --validate)
	@$(BIN)/axonn predict --validate $(if $(filter-out busy,$(FRESH)),--fresh)

validate-local: $(READY) ## predicted and measured batch times of 21 runs on this machine (calibrates; about 8 minutes)
	@$(BIN)/python -m experiments.validation.local_validation

# Two files at a time: many tests wait, or compute on one core.
test: $(READY) ## the tests (15 to 35 minutes on 2 cores, by machine; WORKERS=4: on more)
	@$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile

test-full: $(READY) ## the tests with the full product of configurations (long)
	@$(BIN)/python -m pytest -m 'not slurm' -n $(or $(WORKERS),2) --dist loadfile

test-pages: $(READY) ## the commands of the pages that measure or train for long
	@$(BIN)/python -m pytest -m full -n $(or $(WORKERS),2) tests/test_docs.py

test-isa: $(READY) ## the numeric tests under each instruction set of the processor (OPTIONS='--only default --margin 3')
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.isa --workers $(or $(WORKERS),2) $(OPTIONS)

test-slurm: $(READY) ## jobs on a real Slurm cluster of four nodes on this machine (root; apt-get install slurm-wlm munge)
	@$(BIN)/python -m pytest -m slurm tests/slurm

# A short form of all of these is among the tests.
faults: $(READY) ## break it on purpose, for long: faults, damaged files (EXAMPLES=2000 of each kind), then make soak
	@AXONN_FUZZ_EXAMPLES=$(or $(EXAMPLES),2000) $(BIN)/python -m pytest -n $(or $(WORKERS),2) --timeout 0 \
		-m 'not slurm' tests/*/test_fault*.py tests/training/test_endings.py tests/*/test_fuzz*.py tests/config/test_messages.py \
		tests/config/test_trust.py tests/inter_layer/test_determinism.py tests/checkpoint
	@$(MAKE) soak

soak: $(READY) ## kill or stop training runs 50 times at random moments; every resumed one ends as if nothing had happened
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.soak --times $(or $(TIMES),50) $(if $(SEED),--seed $(SEED))

docs: $(READY) ## the reference of the Python interface: build/docs/index.html
	@$(BIN)/python -m tools.reference build/docs
	@echo build/docs/index.html

lint: $(READY) ## ruff, and the type checker in strict mode on axonn/
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY) ## our schedules and our tensor parallelism beside PyTorch's (QUICK=1 tries the benchmark itself)
	@$(BIN)/python -m tests.bench.frameworks $(QUICK_FLAG)
	@$(BIN)/python -m tests.bench.tensor $(QUICK_FLAG)
	@$(BIN)/python -m pytest tests/bench/bench_engine.py tests/bench/bench_planner.py -s --benchmark-enable --timeout 0

bench-link: $(READY) ## the same over an emulated slow link (root only); JITTER=1: with uneven compute
	@$(BIN)/python -m tests.bench.link $(QUICK_FLAG) $(if $(JITTER),--jitter)
	@$(if $(JITTER),,$(BIN)/python -m tests.bench.tensor --link $(QUICK_FLAG))

bench-tensor: $(READY) ## the part of make bench that is tensor parallelism; LINK=1: that of make bench-link (root only)
	@$(BIN)/python -m tests.bench.tensor $(QUICK_FLAG) $(if $(LINK),--link)

bench-schedules: $(READY) ## schedules on 8 ranks whose compute is a sleep, beside what the simulator says
	@$(BIN)/python -m tests.bench.schedules $(QUICK_FLAG)

bench-optimizer: $(READY) ## offloaded optimizer state; reduction overlapped with the step (with a slow link as root)
	@$(BIN)/python -m tests.bench.optimizer $(QUICK_FLAG)

# Status 2: nothing was measured, so there is nothing new to draw.
bench-gpu: $(READY) ## our engine on one GPU, beside others, in 9 minutes (DEVICE=cpu QUICK=1: in miniature; OPTIONS='--only gpt')
	@status=0; $(BIN)/python -m baselines.gpu.bench_gpu --device $(or $(DEVICE),cuda) $(QUICK_FLAG) $(OPTIONS) || status=$$?; \
		test $$status -gt 1 || $(BIN)/python -m plots.figures.gpu $(GPU_RESULTS)/summary.json || status=$$?; exit $$status

validate-plan: $(READY) ## the planner's choice for 2 ranks beside an exhaustive measured search (needs axonn calibrate)
	@$(BIN)/python -m tests.bench.plan_check $(QUICK_FLAG)

plan-published: $(READY) ## published configurations beside the planner's best at the same scale
	@$(BIN)/python -m experiments.planning.plan_compare

baselines: $(READY) ## install the frameworks to compare with, each apart (ONLY="deepspeed megatron": some of them)
	@bash tools/baselines.sh $(BIN)/python $(or $(ONLY),$(basename $(notdir $(wildcard baselines/environments/*.txt))))

clean-baselines: ## remove these frameworks
	@rm -rf .baselines

clean: ## remove results, figures and run folders of this machine, not the environments
	@rm -rf runs plots/out
	@find results -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} +
