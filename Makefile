# Two commands are all that a fresh machine needs: make reproduce, make test. Both set .venv up on first use.
PYTHON ?= python3
SCALE ?= sample
BIN := .venv/bin

.PHONY: reproduce test test-all test-gpu lint bench clean

# SCALE=smoke: one minute. SCALE=paper ARGS="--images ... --texts ... --val ...": the paper's job; --dry-run: its cost.
reproduce: .venv/ready
	$(BIN)/python -m dimefm.reproduce --scale $(SCALE) $(ARGS)

# At least one quick test of everything that is promised: six minutes on two cores.
test: CHOSEN = -m "not slow and not gpu"

# Every test that there is, but for those of a GPU, which skip themselves: both hide it (tests/conftest.py).
test-all: CHOSEN =

# Style and types are checked beside the tests. What they say comes after, in one piece; either fails the whole.
test test-all: .venv/ready .venv/browser
	@said=$$(mktemp); ($(LINT)) >$$said 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(CHOSEN) $(ARGS); tests=$$?; \
	wait $$lint; checks=$$?; cat $$said; rm $$said; [ $$tests -eq 0 ] && [ $$checks -eq 0 ]

# Only the tests of a GPU. Where there is none that fails, as nothing would have been tested.
test-gpu: .venv/ready
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make test-gpu: torch sees no GPU here; dimefm doctor says why")'
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)

LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lint: .venv/ready
	$(LINT)

bench: .venv/ready
	$(BIN)/python -m benchmarks $(ARGS)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dimefm needs Python 3.11 or newer; give make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

# Pages are tested in a real browser. Where none is there, and Debian's can be installed, it is; else its tests say that
# they are skipped.
APT = apt-get -qq -o Acquire::http::Timeout=15 -o Acquire::Retries=1

.venv/browser: .venv/ready
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  ($(APT) update && $(APT) install -y --no-install-recommends chromium chromium-driver) >/dev/null || true; fi
	@touch .venv/browser

clean:
	rm -rf .venv runs
