# Everything that a developer or CI runs. Each target makes its own virtual environment and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest

.PHONY: demo oldest test check bench docs clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## certify a good and a bad edit of the packaged model
	$(BIN)/invarlock demo

# two processes on two cores
test test-fast: export OMP_NUM_THREADS = 1

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

test-fast: $(READY)  ## run the tests that take no time, in a minute
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal -m "not slow"

check: $(READY)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## measure cost, as ratios in one run
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.diff_cost
	$(BIN)/python -m benchmarks.bisect_cost

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . pytest pytest-timeout
	touch $@

oldest: $(OLDEST)/.ready  ## verify and make certificates with the oldest numpy, scipy and pydantic, without torch
	$(OLDEST)/bin/python -m pytest -q --noconftest tests/evidence/test_rows.py tests/evidence/test_plain.py \
	  tests/policy/test_resolve.py tests/certificate/test_frozen.py tests/certificate/test_what_follows.py

docs: $(READY)  ## build the documentation; a broken link or a stale generated page fails
	$(BIN)/python tools/build_docs.py --check
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf site $(VENV) $(OLDEST) build dist demo-out
