# Every target makes the virtual environment it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most of 11,000 modules are never imported: those that are, are compiled then.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# Rebuilt when the list of dependencies changes.
RUN_STAMP := $(VENV)/.run-$(shell cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.dev-$(shell cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow lint format docs site clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(RUN_STAMP):
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing what the project runs on"
	@$(INSTALL) -r requirements.txt
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing what its tests and checks need"
	@$(INSTALL) -e '.[dev]'
	@touch $@

quickstart: $(RUN_STAMP)  ## the whole way on an embedded corpus: train, search, export, report
	$(BIN)/python launch/pipeline.py --config configs/quickstart.py --workdir runs/quickstart

# Huge pages: tests compile most of the time, and compilers allocate much. Each file in one worker:
# its fixtures are made, and its programs compiled, once; the longest files first (tests/conftest.py).
test: $(DEV_STAMP)  ## the tests
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(DEV_STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(DEV_STAMP)  ## ruff (format and lint), pyright, and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: $(DEV_STAMP)  ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV_STAMP)  ## docs/reference.md from the code, tables and picture from the result files
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_results.py

site: $(DEV_STAMP)  ## the pages of docs/, in site/
	$(INSTALL) -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

clean:  ## remove the virtual environment, runs and caches
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
