# make            from a clone to a trained, measured, sampled and tracked model
# make help       everything else

.DEFAULT_GOAL := all
.PHONY: all help setup test torture bench lint format shakespeare ui sync dagshub clean

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

all: $(VENV)/installed  ## train, evaluate and sample with params.yaml, then sum up
	@python -m minigpt check
	@dvc repro
	@python -m stages

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(VENV)/installed  ## make .venv and install what the pipeline needs, nothing more

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minigpt: Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	@$(VENV)/bin/python -m minigpt.evaluation.plots_page
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: $(VENV)/installed-dev  ## run all tests
	python -m pytest

torture: $(VENV)/installed-dev  ## kill, starve and damage trainings and stores, in full, and print the counts
	TORTURE=full python -m pytest -s tests/integration/test_torture.py tests/integration/test_launcher.py tests/unit/training/test_checkpoint.py tests/unit/data tests/unit/tracking tests/unit/generation/test_serving.py

bench: $(VENV)/installed-dev data/shakespeare.txt  ## measure the project and its peers side by side
	python -m benchmarks

lint: $(VENV)/installed-dev  ## run the linter, the formatter's check and the type checker
	ruff check .
	ruff format --check .
	mypy

format: $(VENV)/installed-dev  ## format the code
	ruff check --fix .
	ruff format .

shakespeare: data/shakespeare.txt  ## fetch Tiny Shakespeare and train its profile for a CPU
	@git diff --quiet HEAD -- params.yaml || cmp -s params.yaml configs/shakespeare-cpu.yaml || \
	  { cp params.yaml params.yaml.mine; echo "minigpt: your params.yaml is kept as params.yaml.mine"; }
	cp configs/shakespeare-cpu.yaml params.yaml
	@$(MAKE) --no-print-directory all

# From the DVC remote, if there is one that has it; else from where it was first published, its digest checked.
data/shakespeare.txt: | $(VENV)/installed
	@dvc pull --quiet $@.dvc 2>/dev/null || { \
	  url=$$(grep -oE 'https?://[^ ]*' $@.dvc); md5=$$(sed -n 's/^- md5: //p' $@.dvc); \
	  dvc get-url --quiet --force "$$url" $@.new && \
	  python -c 'import hashlib, sys; sys.exit(hashlib.md5(open(sys.argv[1], "rb").read()).hexdigest() != sys.argv[2])' $@.new $$md5 && \
	  mv $@.new $@; } || { rm -f $@.new; \
	  echo "minigpt: Tiny Shakespeare came neither from a DVC remote nor from $$(grep -oE 'https?://[^ ]*' $@.dvc)"; \
	  echo "minigpt: name a DVC remote that holds it: dvc remote add --local --default NAME URL; or put it at"; \
	  echo "minigpt: data/input.txt, set data.source in a copy of configs/shakespeare-cpu.yaml to that, and run dvc repro"; exit 1; } >&2

ui: $(VENV)/installed  ## open the MLflow page of this repository's runs
	mlflow ui --backend-store-uri sqlite:///mlflow.db --port $${PORT:-5000}

sync: $(VENV)/installed  ## send runs to the tracking store that were made while it was away
	@python -m minigpt sync

dagshub: $(VENV)/installed  ## connect DVC and MLflow to DagsHub: make dagshub REPO=user/repo
	@python -m minigpt dagshub $(REPO)

clean:  ## remove what the stages wrote; DVC's cache, runs and .venv stay
	rm -rf data/prepared models results
