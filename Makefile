# Every target makes .venv when it is missing and installs when pyproject.toml has changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUTPUT ?= runs/quickstart
# Processes that share the tests, with 2 GiB of memory each.
WORKERS ?= 2
TEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: help install quickstart test test-all test-gpu test-crash lint format docs wheel clean

help:
	@echo "make quickstart   train, sample and score a small model on real digits (3 minutes on 2 cores)"
	@echo "make test         every fast CPU test"
	@echo "make test-all     slow tests too"
	@echo "make test-gpu     tests that need CUDA; a missing device is a failure"
	@echo "make test-crash   kill commands at every write, fill their disk, damage their files (an hour)"
	@echo "make lint         ruff and pyright"
	@echo "make format       let ruff rewrite the code"
	@echo "make docs         the documents as a site, in build/site; a warning is a failure"
	@echo "make wheel        build the wheel into dist/"

$(INSTALLED): pyproject.toml mhla_gen/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/mhla-gen quickstart output_dir=$(OUTPUT)

test: $(INSTALLED)
	$(TEST)

test-all: $(INSTALLED)
	$(TEST) -m "slow or not slow"

test-gpu: $(INSTALLED)
	REQUIRE_GPU=1 $(BIN)/python -m pytest -q -m gpu

test-crash: $(INSTALLED)
	CRASH_TESTS=all $(BIN)/python -m pytest -q tests/test_crashes.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
