# Everything installs into .venv; nothing else on the machine changes. `make` alone lists the commands.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install serve test test-fast lint fmt bench docs clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## set up .venv: vLLM for the CPU, the project, the tools

$(VENV)/.installed: pyproject.toml container/install-cpu.sh container/constraints.txt container/overrides.txt
	@PYTHON=$(PYTHON) bash container/install-cpu.sh $(VENV)
	@touch $@

serve: install ## run graphs.agg with the tiny model on the CPU, ready for curl on port 8000
	@$(BIN)/dynamo serve graphs.agg:Frontend -f configs/agg_tiny.yaml $(ARGS)

test: install ## run all tests, 3 files at a time; 10 minutes on two cores
	@$(BIN)/python -m pytest -n 3 $(ARGS)

test-fast: install ## run the tests that start no server: unit tests and typing; under a minute
	@$(BIN)/python -m pytest -n 2 tests/unit tests/typing $(ARGS)

lint: install ## ruff, mypy --strict, pyright, and the language check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/pyright && $(BIN)/python .ci/words.py

fmt: install ## format the code
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

bench: install ## CPU per token and per request; PEERS=DIR measures ai-dynamo beside it
	@$(BIN)/python -m benchmarks $(if $(PEERS),--peers $(PEERS)) $(ARGS)

docs: $(VENV)/.docs ## the documentation as a website, in build/site; any broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python $(addprefix --find-links ,$(PIP_FIND_LINKS)) \
	  --overrides container/overrides.txt --constraints container/constraints.txt --editable ".[docs]"
	@touch $@

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
