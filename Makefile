# Every target sets up what it needs, in a fresh clone with nothing but Python 3.11 or newer.
#   make demo PYTHON=python3.12
#   make venv PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"   (the small CPU build of torch)
PYTHON ?= python3
PIP_FLAGS ?=
# Processes that share the tests; each wants about 1.5 GB of memory.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# Type checks refuse a directory without Python files.
TYPED := $(foreach d,perflow_blocks tests workflows benchmarks integrations,$(if $(wildcard $(d)/*.py $(d)/*/*.py),$(d)))
STYLED := $(TYPED) $(wildcard *.py)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-browser lint format docs demo-weights workflows evaluate bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 18

venv: $(STAMP)  ## create .venv and install the package with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv  ## draw the demo prompts in four steps with the embedded model, into outputs/demo
	$(BIN)/perflow demo --out outputs/demo

test: venv  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-browser: venv  ## drive the page of `perflow app` in Chromium; takes the docs' screenshot with SCREENSHOT=docs/app.png
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { apt-get update -q && apt-get install -q -y chromium; }
	$(BIN)/python -m pip install -q -c constraints.txt playwright
	SCREENSHOT=$(SCREENSHOT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

lint: venv  ## check style and types
	$(BIN)/python -m ruff check $(STYLED)
	$(BIN)/python -m ruff format --check $(STYLED)
	$(BIN)/python -m mypy $(TYPED)
	@for recipe in $(wildcard workflows/*-*/recipe.py); do $(BIN)/python -m mypy $$recipe || exit 1; done

format: venv  ## rewrite the sources in the project's style
	$(BIN)/python -m ruff check --fix $(STYLED)
	$(BIN)/python -m ruff format $(STYLED)

docs: $(DOCS_STAMP)  ## build the documentation into site/
	$(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	@touch $@

demo-weights: venv  ## train the embedded model again, into runs/demo (takes hours on two cores)
	$(BIN)/python -m perflow_blocks.demo.train --out runs/demo

workflows: venv  ## write the repositories under workflows/ and at the root again, from workflows/generate.py
	$(BIN)/python -m workflows.generate

evaluate: venv  ## the quality table of the embedded model, into outputs/evaluate
	$(BIN)/perflow evaluate --demo

bench: venv  ## run the benchmarks that this machine can run, into benchmarks/results
	$(BIN)/python -m benchmarks

clean:  ## remove .venv, caches and build products; runs/ and outputs/ stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
