# make report   the laptop report, from nothing          make test   every test
# make lint     formatters and linters                   make chat   talk to the laptop's chat model
# make plan     the cost of the full reproduction        make clean  remove the laptop's results
# make dvc      DVC, in an environment of its own

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CORES ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := report
.PHONY: report test bench lint chat plan clean install dvc

install: $(INSTALLED)

$(INSTALLED): pyproject.toml envs/pip.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V); Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Installing into $(VENV): about a minute, and some gigabytes where PyTorch brings CUDA."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint envs/pip.txt --editable '.[dev]'
	@touch $@

dvc: .venv-dvc/.installed

.venv-dvc/.installed: envs/dvc.txt
	@echo "Installing DVC into .venv-dvc: about half a minute."
	@$(PYTHON) -m venv .venv-dvc
	@.venv-dvc/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
	  --requirement envs/dvc.txt
	@touch $@

report: $(INSTALLED)
	@if [ -t 1 ]; then show="--logger rich"; else show="--quiet host reason"; fi; \
	  $(BIN)/snakemake --cores $(CORES) --rerun-incomplete $$show
	@echo "The report: $(abspath results/laptop/report/index.html)"

test: $(INSTALLED) dvc
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	@$(BIN)/python -m bench

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/codespell dllm workflow config docs README.md CONTRIBUTING.md CHANGELOG.md Makefile Snakefile

chat: $(INSTALLED)
	@$(BIN)/dllm chat

plan: $(INSTALLED)
	@$(BIN)/dllm plan config/paper.yaml

clean:
	rm -rf results/laptop
