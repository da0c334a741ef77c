# `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is never imported need not be compiled: that would take a minute. What is, need be compiled only once.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
OUT ?= demo

.PHONY: demo test lint format docs bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.package
	$(BIN)/unrote demo --out $(OUT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation site, in site/; a broken link or reference is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# By hand, on a machine that does nothing else: some 15 minutes, results in benchmarks/results/.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/ensemble_memory.py

clean:
	rm -rf $(VENV) build dist demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Others' trainers that tests run; one says that it needs torchvision, which does not go with a torch for CPUs only.
HOSTS := denoising_diffusion_pytorch==2.3.4 ema-pytorch==0.8.3 einops==0.8.2

# Without isolation the build uses the pinned backend: pip does not apply constraints to the environments it builds in.
INSTALL := $(PIP) --no-build-isolation --editable
$(VENV)/.package: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) hatchling editables
	$(INSTALL) .
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	$(INSTALL) '.[dev]'
	$(PIP) --no-deps $(HOSTS)
	@touch $@
