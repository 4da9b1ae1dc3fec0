# Every target makes .venv and installs what is pinned when that is missing or out of date.
VENV := .venv
REQUIREMENTS ?= cpu# or cuda
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Where gpu-check writes what it found.
GPU_CHECK ?= gpu-check.json
# Two files of tests at a time: much of what a run on real actors needs to start is one thread's work.
SIDE_BY_SIDE := -n 2 --dist loadfile
# ninja, with which DeepSpeed compiles, is looked for there.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# A run has a dozen processes; without their bytecode each compiles the package, and the tests, anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test unit fuzz check format lock bench bench-peer study families gpu-check gpu-check-cpu clean

help:
	@echo "make quickstart   train a small model on arithmetic and show what it learned (10 minutes)"
	@echo "make test         the whole test suite, with real Ray, vLLM and DeepSpeed (20 minutes)"
	@echo "make unit         the tests that start nothing (a minute)"
	@echo "make check        ruff, mypy, import-linter"
	@echo "make fuzz         thousands of broken inputs of every kind (half an hour); SEED=n: case n of each alone"
	@echo "make lock         write the hashes of changed pins, requirements/*.lock"
	@echo "make format       let ruff fix what it can"
	@echo "make bench        speed against bare vLLM and bare torch, side by side"
	@echo "make bench-peer   speed against TRL, in an environment of its own"
	@echo "make study        what the five credit methods' papers claim, on models of a million parameters (an hour)"
	@echo "make families     which families of models a weight sync is proved for, on tiny models (10 minutes)"
	@echo "REQUIREMENTS=cuda make gpu-check   the whole stack on an NVIDIA GPU: correctness, speed, memory (10 minutes)"
	@echo "make gpu-check-cpu  the same checks without a GPU, small: it tests the checks themselves (5 minutes)"
	@echo "REQUIREMENTS=cuda make quickstart   the same with CUDA builds, on a machine with an NVIDIA GPU"
	@echo "make clean        remove .venv and caches (not runs/)"

$(INSTALLED): requirements/install.sh requirements/$(REQUIREMENTS).lock $(wildcard requirements/*.lock) pyproject.toml
	@requirements/install.sh $(VENV) $(REQUIREMENTS)
	@touch $@

ifeq ($(REQUIREMENTS),cuda)
QUICKSTART_GPU := cluster.gpus_per_policy_rank=0.5 cluster.gpus_per_rollout_engine=0.5
endif

quickstart: $(INSTALLED)
	$(BIN)/apportion train experiment=quickstart $(QUICKSTART_GPU)

test: $(INSTALLED)
	@failed=0; \
	$(BIN)/pytest -m "not system" $(SIDE_BY_SIDE) --cov=apportion --cov-report= || failed=1; \
	$(BIN)/pytest -m system $(SIDE_BY_SIDE) --durations=20 --cov=apportion --cov-append --cov-report=term || failed=1; \
	exit $$failed

unit: $(INSTALLED)
	$(BIN)/pytest -m "not system and not slow" $(SIDE_BY_SIDE)

fuzz: $(INSTALLED)
	@cd tests && PYTHONPATH=$(CURDIR) ../$(BIN)/python -m fuzz $(SEED)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(INSTALLED)
	requirements/lock.sh

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

bench-peer: $(INSTALLED)
	$(BIN)/python benchmarks/bench_peer.py

study: $(INSTALLED)
	$(BIN)/python -m benchmarks.credit.run

families: $(INSTALLED)
	$(BIN)/python -m benchmarks.families

gpu-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_check --out $(GPU_CHECK)

gpu-check-cpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_check --cpu

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage build
