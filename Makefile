# Each target does its own set-up: Python 3.11 or later and make are all a machine needs. `make help` lists the targets.

# Which Python makes .venv: the first of these that is new enough, or `make PYTHON=...`.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# More words for the command of demo, test, test-matrix and bench: make test ARGS="-k decay"
ARGS ?=
# Where make wheels puts what it builds.
DIST ?= dist

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Newer than what they depend on when the set-up below them has been done.
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

# The tests start hundreds of processes: each would compile all sources anew where no bytecode may be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo cluster-demo test test-matrix soak lint docs bench wheels clean

help: ## Say what each target does
	@echo 'make TARGET [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(DEV) ## Make .venv and install everything into it (the other targets do this when it is needed)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(STAMP): pyproject.toml client/pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) with $(PYTHON); torch is large, so the first time takes some minutes"
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

# The frameworks that the integrations are tested with are large, and no demo needs them.
$(DEV): $(STAMP)
	$(PIP_INSTALL) -e '.[demo,test,lint,integrations,otel,publish,ray]'
	@touch $@

$(DOCS): $(STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

demo: $(STAMP) ## Trainer, server and evaluator at work on real data for a minute; ends with a table and a picture
	$(BIN)/ema-service demo $(ARGS)

cluster-demo: $(VENV)/.installed-ray ## Three hosts under Ray on this machine, one of which is killed; ends with a verdict
	$(BIN)/python -m ema_service.demo.on_ray

# Ray is 70 MB that nobody else here needs.
$(VENV)/.installed-ray: $(STAMP)
	$(PIP_INSTALL) -e '.[demo,ray]'
	@touch $@

test: $(DEV) ## Run all tests
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-matrix: $(VENV)/matrix/.installed ## Run the tests' core on each Python from 3.11 to 3.14, and with the oldest dependencies (ARGS="3.12 lowest")
	$(VENV)/matrix/bin/python tests/matrix.py $(VENV)/matrix $(ARGS)

$(VENV)/matrix/.installed: constraints.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/matrix
	$(VENV)/matrix/bin/python -m pip install --disable-pip-version-check -c constraints.txt uv # the extra matrix, without the rest
	@touch $@

soak: $(DEV) $(DOCS) ## Ten minutes of random lives of runs, with kill -9, against an oracle (prints its seeds), one of overload, and the long tests
	$(BIN)/python -m pytest tests/fuzz/test_life.py tests/e2e/test_overload.py --soak 600 --timeout 750 -o faulthandler_timeout=800 $(ARGS)
	$(BIN)/python -m pytest -n 4 --dist loadfile -m soak --soak 1 --timeout 600 -o faulthandler_timeout=800 $(ARGS)
	$(BIN)/python -m pytest -n 2 --dist loadfile --hosts 2 tests/client tests/integrations $(ARGS)

lint: $(DEV) ## Check style, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ema_service client/ema_client

docs: $(DOCS) ## Build the documentation as a site into site/; open site/index.html, no server needed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

bench: $(VENV)/bench/.installed ## Measure speed and memory beside other libraries, in one run (some minutes; ARGS=--quick)
	$(VENV)/bench/bin/python tests/benchmarks/run.py $(ARGS)

# An environment of its own: what the libraries to compare with bring (torchvision, for one) may not fit this torch, and would
# keep the frameworks of the tests from being imported. What gaps cost is seen in the demo's training, hence its extra.
$(VENV)/bench/.installed: $(STAMP)
	$(BIN)/python -m venv $(VENV)/bench
	$(VENV)/bench/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[bench,demo]'
	@touch $@

# Needs neither torch nor the other dependencies: pip gets what builds wheels by itself.
wheels: | $(BIN)/python ## Build the wheels of server and client into dist/
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir $(DIST) . ./client

clean: ## Delete .venv, caches and what make demo drew; the server's data (ema-data) is left alone
	rm -rf $(VENV) site ema-demo.png build dist client/dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find ema_service client tests -type d -name __pycache__ -prune -exec rm -rf {} +
