# Every target works on a fresh machine with make and Python >= 3.10: it first installs what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that what was interrupted is done again.
DEMO_READY := $(VENV)/.demo
READY := $(VENV)/.ready
FRAMEWORKS := langchain,llama-index,haystack
EXTRAS := all,ray
# Thin distributions, each around one adapter.
THIN := $(notdir $(wildcard packages/*))
FUZZ_ROUNDS ?= 100000
SOAK_SECONDS ?= 1800

.DEFAULT_GOAL := help
.PHONY: help setup demo test browser fuzz soak packages alone notebooks lint types docs bench lowest clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# $(call environment,folder): a virtual environment with a new pip. Debian keeps what it takes in a package of its own.
VENV_PACKAGE = $(notdir $(PYTHON))-venv
define environment
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes $(VENV_PACKAGE); } >/dev/null 2>&1 || \
	{ echo '$(PYTHON) cannot make virtual environments: install $(VENV_PACKAGE) (apt-get install $(VENV_PACKAGE))' >&2; exit 1; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip
endef

# $(call install,folder,what): the package as it lies here, and what it needs in the tested versions. Compiling every module
# takes longer than all the rest; Python compiles those that are imported.
define install
	$(call environment,$(1))
	$(1)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --editable $(2)
endef

setup: $(READY) ## make .venv with the tested versions of everything (other targets do it when needed)

$(READY): pyproject.toml constraints.txt $(THIN:%=packages/%/pyproject.toml)
	$(call install,$(VENV),'.[$(EXTRAS)]' --group dev $(THIN:%=--editable packages/%))
	touch $(DEMO_READY) $@

$(DEMO_READY): pyproject.toml constraints.txt
	$(call install,$(VENV),'.[$(FRAMEWORKS)]' --group demo)
	touch $@

demo: $(DEMO_READY) ## rerank real passages with the built-in checkpoint
	$(BIN)/kalm demo

test: $(READY) ## run the tests, offline
	$(BIN)/python -m pytest --ignore tests/test_notebooks.py --ignore tests/browser

browser: $(READY) ## run the tests of the page of `kalm ui` in chromium, which is installed where that may be
	@command -v chromium >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 || \
	{ echo 'the tests of the page need chromium: install it (apt-get install chromium)' >&2; exit 1; }
	$(BIN)/python -m pytest tests/browser

fuzz: $(READY) ## throw values, strings and files of all kinds at everything; half an hour
	KALM_FUZZ_ROUNDS=$(FUZZ_ROUNDS) $(BIN)/python -m pytest tests/fuzz

# oneDNN keeps a kernel for every shape of batch, 1,024 of them: with fewer, what grows is not that.
soak: $(READY) ## ingest, query, update and delete in real stores, watching scores and memory; half an hour
	KALM_SOAK_SECONDS=$(SOAK_SECONDS) ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 $(BIN)/python -m pytest -s tests/soak

packages: $(READY) ## build what a release uploads, into dist/: kalm-integrations and the thin distributions in packages/
	rm -rf dist
	for folder in . $(THIN:%=packages/%); do $(BIN)/python -m build --no-isolation --outdir dist $$folder || exit 1; done

alone: alone-langchain alone-llama-index alone-haystack ## test each adapter where only its framework and our wheels are installed

# The wheels, and `pytest` instead of `python -m pytest`: what is tested are the installed files, not those that lie here.
alone-langchain: WHEEL := langchain_kalm
alone-llama-index: WHEEL := llama_index_postprocessor_kalm
alone-haystack: WHEEL := kalm_haystack
alone-%: packages
	rm -rf $(VENV)-$*
	$(call environment,$(VENV)-$*)
	$(VENV)-$*/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --group $@ dist/kalm_integrations-*.whl dist/$(WHEEL)-*.whl
	$(VENV)-$*/bin/pytest tests/test_packages.py -k $(WHEEL)
	$(VENV)-$*/bin/pytest tests/adapters/test_$(subst -,_,$*).py
	rm -rf $(VENV)-$*

notebooks: $(READY) ## run the notebooks
	$(BIN)/python -m pytest tests/test_notebooks.py

lint: $(READY) ## check style, format, spelling and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell README.md docs notebooks packages tests kalm_integrations haystack_integrations
	$(BIN)/lint-imports --no-logo

types: $(READY) ## check types
	$(BIN)/mypy

docs: $(READY) ## build the documentation into site/, refusing broken links
	$(BIN)/mkdocs build --strict

bench: $(READY) ## measure parity, memory, load time, speed and stores (docs/parity.md, docs/benchmarks.md, docs/stores.md); half an hour
	cd tests && ../$(BIN)/python -m tools.parity
	cd tests && ../$(BIN)/python -m tools.real_shape
	cd tests && ../$(BIN)/python -m benchmarks measure
	cd tests && ../$(BIN)/python -m benchmarks.callers
	cd tests && ../$(BIN)/python -m benchmarks.serving
	cd tests && ../$(BIN)/python -m benchmarks render
	cd tests && ../$(BIN)/python -m benchmarks.stores measure
	cd tests && ../$(BIN)/python -m benchmarks.stores render

# Copied, not linked from uv's cache: NLTK, which LlamaIndex splits with, reads no file that has two names.
UV_LOWEST = $(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest --link-mode copy --resolution lowest-direct --group lowest
lowest: ## run the tests of core, adapters, service and training with the lowest versions that pyproject.toml admits; downloads 6 GB
	rm -rf $(VENV)-lowest
	$(call environment,$(VENV)-lowest)
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints.txt uv
	$(UV_LOWEST) --editable '.[$(FRAMEWORKS),sentence-transformers,eval,ray,redis,telemetry]'
	cd tests && ../$(VENV)-lowest/bin/python -m tools.bounds
	$(VENV)-lowest/bin/python -m pytest tests/bulk tests/core tests/adapters tests/remote tests/serving tests/test_tracing.py --ignore tests/serving/test_clients.py
	$(UV_LOWEST) --editable '.[all]'
	cd tests && ../$(VENV)-lowest/bin/python -m tools.bounds
	$(VENV)-lowest/bin/python -m pytest tests/training

clean: ## remove what was built and cached, but not .venv
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
