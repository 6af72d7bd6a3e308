# make first    a model that answers, in a minute        make quick  the tests of the inner loop, in less than a minute
# make report   the laptop report, from nothing          make test   every test
# make lint     formatters, linters and types            make chat   talk to the laptop's chat model
# make chat-web   the same in a browser, and for programs: serves it and prints the address
# make plan     the cost of the full reproduction        make clean  remove the laptop's results
# make smoke    any configuration cut short to minutes, with its real models and data: CONFIG=config/paper.yaml
# make small    a chatbot of 17 million parameters from three starts, about an hour on four cores: CORES=4
# make one-gpu  the essential path with real models and data, on one GPU in less than a day
# make systems  every kind of diffusion model, at toy size   make dvc   DVC, in an environment of its own
# make docs     the pages and an API reference as a site, in build/docs/html
# make showcase   after make report: its page, tables and figures into results/showcase, its scores into README.md
# make unlock   after a run that was cut off: let the next one begin, whatever configuration it had

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CORES ?= 2
CONFIG ?= config/paper.yaml
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# scripts of a virtual environment hold its absolute path: in a clone that was moved it is made again
$(foreach stamp,$(INSTALLED) .venv-dvc/.installed,\
  $(if $(filter-out $(abspath $(dir $(stamp))),$(shell cat $(stamp) 2>/dev/null)),$(shell rm -f $(stamp))))
export PATH := $(abspath $(BIN)):$(PATH)
# what one process has compiled the next ones read
unexport PYTHONDONTWRITEBYTECODE
# without a home that can be written, what Snakemake and the hub's client keep stands in the clone
ifeq ($(XDG_CACHE_HOME)$(shell [ -w "$$HOME" ] && [ -d "$$HOME" ] && echo home),)
export XDG_CACHE_HOME := $(abspath .cache)
endif

MADE := results/laptop/downloads
# neither Slurm nor other processes, and no model of more than toy size
QUICK := $(addprefix tests/,core objectives planning sampling) \
  $(patsubst %,tests/test_%.py,algorithms config house schedules)

.DEFAULT_GOAL := report
.PHONY: first report showcase systems test quick bench lint docs chat chat-web plan smoke small one-gpu clean install dvc unlock

# after a snakemake that failed: which work directory below results is locked, if it was that
LOCKED = { status=$$?; for lock in results/$(1)/.snakemake/locks/*.lock; do [ ! -e "$$lock" ] || \
  { echo "make: $${lock%%/.snakemake*} is locked by a run that was cut off, unless one is at work: make unlock" >&2; \
  break; }; done; exit $$status; }

# $(call run,NAME,CONFIGS): the whole graph below results/NAME
define run
if [ -t 1 ]; then show="--logger rich"; else show="--quiet host reason"; fi; \
  $(BIN)/snakemake --cores $(CORES) --rerun-incomplete $$show $(2) || $(call LOCKED,$(1))
endef

# compiles what jobs load, a fifth of what is installed; pip would compile all of it, for a minute more
LOAD := from importlib import import_module; from dllm.cli.warm import LOADED; list(map(import_module, LOADED))

install: $(INSTALLED)

$(INSTALLED): pyproject.toml envs/pip.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V); Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Installing into $(VENV): about a minute, and some gigabytes where PyTorch brings CUDA."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint envs/pip.txt \
	  --editable '.[dev]'
	@$(BIN)/python -c '$(LOAD)'
	@printf %s "$(abspath $(VENV))" > $@

dvc: .venv-dvc/.installed

.venv-dvc/.installed: envs/dvc.txt
	@echo "Installing DVC into .venv-dvc: about half a minute."
	@$(PYTHON) -m venv --clear .venv-dvc
	@.venv-dvc/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
	  --requirement envs/dvc.txt
	@printf %s "$(abspath .venv-dvc)" > $@

first: $(INSTALLED)
	@echo "Making a small world and an untrained model: some seconds."
	@$(BIN)/snakemake --cores $(CORES) --quiet all -- downloads/pocket-world.json downloads/modernbert-base-untrained.json
	@OMP_NUM_THREADS=1 $(BIN)/dllm tune $(MADE)/modernbert-base-untrained $(MADE)/pocket-world/smoltalk/train.jsonl \
	  --steps 400 --learning-rate 0.003 --output results/first

report: $(INSTALLED)
	@$(call run,laptop)
	@echo "The report: $(abspath results/laptop/report/index.html)"

showcase: $(INSTALLED)
	@$(BIN)/python docs/showcase.py results/laptop
	@echo "Shown in results/showcase and README.md: commit both."

systems: $(INSTALLED)
	@$(call run,systems,--configfile config/laptop.yaml config/systems.yaml)
	@echo "The comparison: $(abspath results/systems/report/index.html)"

quick: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(QUICK) $(addprefix --ignore=tests/objectives/test_,edit_flows.py bd3lm.py)

test: $(INSTALLED) dvc
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	@$(BIN)/python -m bench

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/codespell dllm workflow slurm config docs README.md CONTRIBUTING.md CHANGELOG.md Makefile Snakefile

docs: $(INSTALLED)
	@$(BIN)/python docs/site/build.py

chat: $(INSTALLED)
	@$(BIN)/dllm chat

chat-web: $(INSTALLED)
	@$(BIN)/dllm serve

plan: $(INSTALLED)
	@$(BIN)/dllm plan config/paper.yaml

# goes on after a job that fails: the page at the end shows all that does not work, and the plan before it what is fetched
smoke: $(INSTALLED)
	@$(BIN)/dllm plan $(CONFIG) config/smoke.yaml
	@$(BIN)/snakemake --cores $(CORES) --keep-going --rerun-incomplete --quiet host reason \
	  --configfile $(CONFIG) config/smoke.yaml || $(call LOCKED,*-rehearsal)

small: $(INSTALLED)
	@$(BIN)/dllm plan config/small.yaml
	@$(call run,small,--configfile config/small.yaml)
	@echo "The report: $(abspath results/small/report/index.html)"

# shows the plan, asks (YES=1 answers), then runs everything: downloads and tokenizing side by side, one job on the GPU
one-gpu: $(INSTALLED)
	@$(BIN)/dllm plan config/one-gpu.yaml
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.accelerator.is_available())' || \
	  { echo "make one-gpu: PyTorch sees no GPU here; see docs/reproduce.md, On one GPU" >&2; exit 2; }
	@if [ "$(YES)" != 1 ]; then \
	  [ -t 0 ] || { echo "make one-gpu: nobody to ask; make one-gpu YES=1 starts it" >&2; exit 2; }; \
	  read -r -p "Start this? [y/N] " answer; [ "$$answer" = y ] || exit 2; fi
	@$(BIN)/snakemake --cores all --resources gpu=1 --rerun-incomplete --configfile config/one-gpu.yaml || \
	  $(call LOCKED,one-gpu)
	@echo "The report: $(abspath results/one-gpu/report/index.html)"

# what `snakemake --unlock` does, for every work directory below results; of one elsewhere CONFIG names the configuration
unlock:
	@rm -rf results/*/.snakemake/locks
	@$(if $(filter command,$(firstword $(origin CONFIG))),$(BIN)/snakemake --unlock --quiet all --configfile $(CONFIG))

clean:
	rm -rf results/laptop results/first
