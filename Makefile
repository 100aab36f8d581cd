# Two commands matter: `make demo` and `make test`. Both set up what they need, and may be repeated.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
WORKSPACE ?= day0-workspace
RECIPE ?= int8

.PHONY: demo plan smoke test test-fast lint types docs environments slurm clean

demo: .venv/.installed environments
	$(BIN)/day0 release demo --recipe $(RECIPE) --workspace $(WORKSPACE)

plan: .venv/.installed
	$(BIN)/day0 release demo --recipe $(RECIPE) --workspace $(WORKSPACE) --plan-only

smoke: .venv/.installed
	$(BIN)/day0 smoke

test: .venv/.installed environments slurm
	$(BIN)/pytest -n 2 --dist loadfile -m "not tools"
	$(BIN)/pytest -m tools

test-fast: .venv/.installed
	$(BIN)/pytest -n 2 -m "not tools and not slurm"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/day0 config check

types: .venv/.installed
	$(BIN)/mypy

docs: .venv/.installed
	$(BIN)/python -m conductor.reference_pages docs/reference
	$(BIN)/python tests/fault_corpus.py docs/reference/fault-corpus.md

environments: .venv/.installed
	@$(BIN)/python -m conductor.environments build

slurm:
	@scripts/install-slurm.sh || echo "The tests that need Slurm are skipped."

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "day0 needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { echo "Python cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv
