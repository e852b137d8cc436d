# Each target makes .venv from constraints.txt when it is missing or older.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint format bench clean

quickstart: $(VENV)/ready  ## Render a corpus, train one tiny elastic model on it, show accuracy against visual tokens
	$(BIN)/mqt-llava quickstart

test: $(VENV)/ready  ## Everything that needs no accelerator, in minutes
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/released_parity.py
	$(BIN)/python benchmarks/convert_memory.py
	$(BIN)/python benchmarks/training.py --steps 8
	$(BIN)/python benchmarks/training_data.py
	$(BIN)/python benchmarks/training_memory.py

# torch first and by itself: on many machines a bare `torch` would bring gigabytes of CUDA packages.
$(VENV)/ready: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
