# Every target works on a fresh machine with make and Python >= 3.10: the first one sets up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that an interrupted set-up is done again.
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test alone notebooks lint types docs bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with the tested versions of everything (other targets do it when needed)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	touch $@

demo: $(READY) ## rerank real passages with the built-in checkpoint
	$(BIN)/kalm demo

test: $(READY) ## run the tests, offline
	$(BIN)/python -m pytest --ignore tests/test_notebooks.py

alone: alone-langchain alone-llama-index alone-haystack ## test each adapter where only its framework is installed

alone-%:
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]' --group $@
	$(VENV)-$*/bin/python -m pytest tests/adapters/test_$(subst -,_,$*).py
	rm -rf $(VENV)-$*

notebooks: $(READY) ## run the notebooks
	$(BIN)/python -m pytest tests/test_notebooks.py

lint: $(READY) ## check style, format and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo

types: $(READY) ## check types
	$(BIN)/mypy

docs: $(READY) ## build the documentation into site/, refusing broken links
	$(BIN)/mkdocs build --strict

bench: $(READY) ## measure parity, memory, load time and speed (docs/parity.md, docs/benchmarks.md); half an hour
	$(BIN)/python tests/parity.py
	$(BIN)/python tests/real_shape.py
	cd tests && ../$(BIN)/python -m benchmarks measure
	cd tests && ../$(BIN)/python -m benchmarks render

clean: ## remove what was built and cached, but not .venv
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
