# make            install everything, then train, evaluate and sample
# make help       list the targets

.DEFAULT_GOAL := all
.PHONY: all help setup test test-slow test-all coverage torture bench bench-gpu lint format docs shakespeare page ui sync dagshub clean

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The literal text of REPO, because make would run $(shell ...) in it, and the shell $(...).
override REPO := $(value REPO)
export REPO

all: $(VENV)/installed  ## run all stages with params.yaml, and show the results
	@minigpt check > /dev/null
	@MINIGPT_SUMMARY=off dvc repro
	@minigpt summary

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(VENV)/installed  ## only create .venv and install the dependencies

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minigpt: Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	@echo "minigpt: installing PyTorch, DVC and MLflow into $(VENV), once; this takes two to ten minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	@$(VENV)/bin/minigpt plots-page
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "minigpt: installing the tools for tests into $(VENV), once; this takes a few minutes"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	@echo "minigpt: installing Sphinx into $(VENV), once; this takes a minute"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Two workers are faster than one on any machine with two cores, and each loads torch and mlflow.
PYTEST = pytest -n $${WORKERS:-2} --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed-dev  ## run the fast tests of every part, in random order
	python -m $(PYTEST) -m "not slow"

test-slow: $(VENV)/installed-dev  ## run only the slow tests: kills, faults, servers, several processes
	python -m $(PYTEST) -m slow

test-all: test test-slow  ## run all tests

coverage: $(VENV)/installed-dev  ## run the fast tests, and print the branches that they do not reach
	coverage erase
	coverage run -m $(PYTEST) -m "not slow"
	coverage combine --quiet
	coverage report

torture: $(VENV)/installed-dev  ## run the fault tests at full length, and print their counts
	TORTURE=full python -m pytest -s tests/integration/test_torture.py tests/integration/test_soak.py tests/integration/test_launcher.py tests/integration/test_fuzz.py tests/integration/test_fuzz_tracking.py tests/integration/test_fuzz_serving.py tests/unit/training/test_checkpoint.py tests/unit/data tests/unit/tracking tests/unit/generation/test_serving.py

bench: $(VENV)/installed-dev data/shakespeare.txt  ## compare the speed with other implementations
	python -m benchmarks

bench-gpu: $(VENV)/installed-dev data/shakespeare.txt  ## measure a GPU in nine minutes; a CPU in a small form
	python -m benchmarks.gpu

lint: $(VENV)/installed-dev  ## run the linter, the format check and the type checker
	ruff check .
	ruff format --check .
	mypy

format: $(VENV)/installed-dev  ## format the code
	ruff check --fix .
	ruff format .

# Two passes over the same pages: the first warns of undocumented objects, the second of broken links and names.
docs: $(VENV)/installed-docs  ## build the documentation as a site, in site/; any warning is an error
	python -m sphinx --quiet --nitpicky --fail-on-warning --conf-dir docs --doctree-dir site/.doctrees --builder coverage . site/.coverage
	python -m sphinx --quiet --nitpicky --fail-on-warning --conf-dir docs --doctree-dir site/.doctrees . site
	@echo "minigpt: open site/docs/README.html"

shakespeare: $(VENV)/installed  ## fetch Tiny Shakespeare, and train on it with the profile for a CPU
	@minigpt profile shakespeare-cpu
	@$(MAKE) --no-print-directory all

data/shakespeare.txt: | $(VENV)/installed
	@python -m minigpt.texts $@

page: $(VENV)/installed  ## open the web page that contains the model
	@python -c 'import pathlib, sys, webbrowser; page = pathlib.Path("results/sample/page.html").resolve(); page.exists() or sys.exit("minigpt: no page yet; run make"); webbrowser.open(page.as_uri()) or print(page)'

ui: $(VENV)/installed  ## start MLflow with the runs of this repository
	@minigpt ui --port $${PORT:-5000}

sync: $(VENV)/installed  ## upload runs that are not in MLflow yet
	@minigpt sync

dagshub: $(VENV)/installed  ## connect DVC and MLflow to DagsHub: make dagshub REPO=user/repo
	@minigpt dagshub -- "$$REPO"

clean:  ## remove the outputs of the stages; the DVC cache, runs and .venv stay
	rm -rf data/prepared models results
