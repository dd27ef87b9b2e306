# `make demo` and `make test` set themselves up on a fresh machine: all they need is Python and pip's index.

PYTHON ?= python3
# Installed before everything else: with a CPU build in place, nothing below pulls in gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
WORKERS ?= 2
RUN ?= runs/demo-ioi

BIN := .venv/bin
# Named after the content of pyproject.toml, so a rerun installs only when the dependencies changed.
STAMP := .venv/.stamp-$(firstword $(shell cksum pyproject.toml))

# torchao's compiled kernels are for CUDA; this keeps it from trying, and warning about, each of them.
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES ?= 1

.PHONY: setup demo test test-all lint format smollm2 clean

setup: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[test]"
	rm -f .venv/.stamp-*
	touch $@

demo: $(STAMP)
	rm -rf "$(RUN)"
	$(BIN)/pahq discover demo --task ioi --n 20 --threshold 0.05 --out "$(RUN)"
	$(BIN)/pahq show "$(RUN)"

# `test` checks everything a user relies on, `test-all` every crossing of it besides; CONTRIBUTING.md has the tiers.
test: TIER := -m "not exhaustive"
test-all: TIER := --hypothesis-profile=exhaustive

# The tests of pages need a browser; Debian's is installed where there is none (as root).
test test-all: lint
	$(BIN)/python -m tests.browser
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TIER) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smollm2: $(STAMP)
	$(BIN)/python tools/fetch_smollm2.py

clean:
	rm -rf .venv build dist runs .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
