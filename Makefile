# From nothing to a result: `make demo`, `make test`, ... Each needs only Python 3.11 to 3.13 and make; what else it
# needs it installs into .venv, anew when pyproject.toml or constraints.txt changes. To change the Python:
# `make clean`, then `make test PYTHON=python3.12`.
PYTHON ?= python3
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# One thread for each process: the problems are small, and threads that outnumber the cores make each other wait.
# The BLAS libraries of NumPy, SciPy (which does JAX's linear algebra) and torch all heed this variable.
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench reference clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-11s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED)  ## run examples/demo.py
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  ## run the tests, but for the slow ones
	$(PYTEST)

test-slow: $(INSTALLED)  ## run the slow tests only
	$(PYTEST) -m slow

lint: $(INSTALLED)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## repair style and format where that is safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measure the cost of a step, stock and traced, and the number of steps on conjugate models
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/conjugate.py
	$(BIN)/python benchmarks/traced.py

reference: $(INSTALLED)  ## compare with Adam and score matching on the posteriors in DATA=folder
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python benchmarks/reference.py --data '$(DATA)'

clean:  ## remove .venv and whatever the tools and the examples left
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo.png streaming.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[pyro,numpyro,examples,examples-numpyro,dev]'
	touch $@
