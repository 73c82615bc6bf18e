# Two commands are all that a fresh machine needs: make reproduce, make test. Both set .venv up on first use.
PYTHON ?= python3
SCALE ?= sample
BIN := .venv/bin

.PHONY: reproduce test lint bench clean

# SCALE=smoke: under three minutes. SCALE=paper ARGS="--images ... --texts ... --val ...": the paper's job; --dry-run: its cost.
reproduce: .venv/ready
	$(BIN)/python -m dimefm.reproduce --scale $(SCALE) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dimefm needs Python 3.11 or newer; give make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

clean:
	rm -rf .venv runs
