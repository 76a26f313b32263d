# `make run` and `make test` set up everything on a fresh machine; later calls reuse .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-all testbed lint bench clean

run: $(READY)
	$(BIN)/keelguard quickstart

# One process per core with one thread each: models this small gain nothing from a second thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: $(READY) testbed
	$(PYTEST) -m "not slow"

test-all: $(READY) testbed
	$(PYTEST)

testbed: $(READY)
	$(BIN)/keelguard testbed build --only aligned --only aligned-sparse

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python benchmarks/testbed_seeds.py
	$(BIN)/python benchmarks/costs.py
	$(BIN)/python benchmarks/units_selectivity.py
	$(BIN)/python benchmarks/protect.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/units_cost.py
	$(BIN)/python benchmarks/signal_quality.py
	$(BIN)/python benchmarks/signal_overhead.py
	$(BIN)/python benchmarks/purify_quality.py
	$(BIN)/python benchmarks/purify_cost.py
	$(BIN)/python benchmarks/vaccine_why.py
	$(BIN)/python benchmarks/continued.py
	$(BIN)/python benchmarks/shift.py
	$(BIN)/python benchmarks/memory.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs
