# speechloss: every command sets up what it needs, once, in one virtual environment.
# `make` alone lists the commands.

PAPER  ?= all
SCALE  ?= smoke
SEED   ?= 0
OUT    ?= runs
CORPUS ?=
CORPUS_DIR ?=
PYTHON ?= python3
VENV   ?= .venv

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup reproduce test notebooks smoke pytest lint bench gpu docs docs-serve browser readme lab export clean FORCE

# One thread a process: the work is spread over processes instead.
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

run   := "$(VENV)/bin/python"
ready := $(VENV)/.ready

help:  ## this list
	@echo 'speechloss'
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | \
	    while IFS=$$'\t' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done
	@echo
	@echo '  PAPER=$(PAPER) SCALE=$(SCALE) SEED=$(SEED) OUT=$(OUT) CORPUS= CORPUS_DIR=   of make reproduce'
	@echo '  PYTHON=$(PYTHON) VENV=$(VENV)                               of every command'

reproduce: $(ready)  ## run a paper (PAPER=, SCALE=smoke|laptop|paper) up to its verdicts
	@$(run) -m speechloss reproduce "$(PAPER)" --scale "$(SCALE)" --seed "$(SEED)" --out "$(OUT)" \
	    $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(CORPUS_DIR),--corpus-dir "$(CORPUS_DIR)")

# The parts run one after the other, each on all processors.
test: $(ready)  ## everything: style, notebooks, site, smoke reproduction, pytest
	@$(MAKE) lint notebooks docs smoke pytest
	@echo 'make test: everything passed.'

lint: $(ready)
	@echo '== style (ruff), types (mypy)'
	@$(run) -m ruff check
	@$(run) -m mypy

# Run as nbdev_test runs them; what they draw is kept for the site.
notebooks: $(ready)
	@echo '== the cells of the notebooks'
	@HF_HUB_OFFLINE=1 $(run) .ci/docs.py draw

# With a cache of its own, so that the code of today trains; only the corpora are shared.
define share_corpora
from pathlib import Path
from speechloss.common.files import home
corpora, mine = home().absolute()/'corpora', Path('build/home')
for folder in corpora, mine: folder.mkdir(parents=True, exist_ok=True)
(mine/'corpora').symlink_to(corpora)
endef
export share_corpora

smoke: $(ready)
	@echo '== every paper at smoke scale'
	@rm -rf build/smoke build/home
	@$(run) -c "$$share_corpora"
	@SPEECHLOSS_HOME=build/home $(MAKE) reproduce PAPER=all SCALE=smoke SEED=0 OUT=build/smoke

pytest: browser
	@echo '== pytest: export in sync, notebooks clean, wheel, numerics, faults, the site in a browser'
	@$(run) -m pytest -n 2

bench: $(ready)  ## time the kernels beside their rivals, rows appended to benchmarks/own_rows.csv
	@$(run) -m benchmarks.run --own

# On a machine without an environment: python benchmarks/gpu.py, with torch, triton, numpy and pytest.
gpu: $(ready)  ## check and time the kernels on this machine's GPU in ten minutes, rows in build/gpu
	@$(run) benchmarks/gpu.py

# Quarto: the one on the PATH, or the pinned one that its package on PyPI fetches from the project's own site.
docs: $(ready)  ## build the site in _site, by Quarto or plainly without it, and check it
	@PATH="$$PWD/$(VENV)/bin:$$PATH" command -v quarto >/dev/null || \
	    $(run) -m pip install -q --disable-pip-version-check -c constraints.txt quarto-cli >/dev/null 2>&1 || \
	    echo 'Quarto could not be fetched: the site gets a plain frame (https://quarto.org/docs/get-started)'
	@PATH="$$PWD/$(VENV)/bin:$$PATH" HF_HUB_OFFLINE=1 $(run) .ci/docs.py site

docs-serve:  ## build the site and open it
	@$(MAKE) docs
	@echo 'The site is at http://127.0.0.1:8000, until Ctrl-C.'
	@(sleep 1; $(run) -m webbrowser http://127.0.0.1:8000 >/dev/null) & \
	    $(run) -m http.server --bind 127.0.0.1 --directory _site 8000

# For the tests of the site: the browser that is here, the distribution's, or Playwright's own.
browser: $(ready)
	@command -v chromium chromium-browser google-chrome chrome >/dev/null || \
	    { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
	    "$(VENV)/bin/playwright" install chromium || \
	    echo 'speechloss: no browser could be had, and the tests that need one are skipped: install Chromium'

readme: $(ready)  ## run nbs/index.ipynb and write README.md from it
	@$(run) .ci/docs.py readme

export: $(ready)  ## write speechloss/*.py from the notebooks, and clean the notebooks
	@"$(VENV)/bin/nbdev_export"
	@"$(VENV)/bin/nbdev_clean"

lab: $(ready)  ## open the notebooks in JupyterLab
	@$(run) -m jupyter lab --notebook-dir=nbs

clean:  ## remove what was built (keeps the environment and the runs)
	@rm -rf build dist _site .quarto .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

setup: $(ready)

# The stamp holds the place of the checkout: a moved checkout is set up again.
ifneq ($(shell cat "$(ready)" 2>/dev/null),$(CURDIR))
$(ready): FORCE
endif

$(ready): setup.py settings.ini constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo 'speechloss: no $(PYTHON) here: install Python 3.11 or newer, or name one with PYTHON='; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "speechloss: needs Python 3.11 or newer, this is $$("$(PYTHON)" -V 2>&1): name a newer one with PYTHON="; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'speechloss: this Python cannot make virtual environments: install its venv package (Debian: python3-venv)'; exit 2; }
	@command -v cc gcc clang >/dev/null || { \
	    echo 'speechloss: no C compiler, and the PESQ metric is built from source: install gcc'; exit 2; }
	@"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { \
	    echo 'speechloss: no Python headers, and the PESQ metric is built from source: install them (Debian: python3-dev)'; exit 2; }
	@echo 'Setting up $(VENV): the first time takes some minutes and 3 GB.'
	@"$(PYTHON)" -m venv "$(VENV)"
	@$(run) -m pip install $$([ -t 1 ] || echo -q) --disable-pip-version-check -c constraints.txt -e '.[dev]' || { \
	    echo 'speechloss: pip could not install the packages, its reason is above; run the same command again to go on'; exit 2; }
	@git rev-parse --git-dir >/dev/null 2>&1 && { \
	    git config merge.nbdev-merge.name 'notebooks, cell by cell' && \
	    git config merge.nbdev-merge.driver '"$(VENV)/bin/nbdev_merge" %O %A %B %P' && \
	    "$(VENV)/bin/pre-commit" install >/dev/null; } || \
	    echo 'speechloss: no git hooks here: a commit is not checked before it is made'
	@printf %s "$(CURDIR)" > "$@"
