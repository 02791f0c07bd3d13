# Two commands: `make demo` and `make test`. Each sets up what it needs in $(VENV), once.
#
#   PYTHON=python3.12   the interpreter to build the environment from (3.10 or newer)
#   TORCH=torch==2.11.0 another PyTorch (2.10 or newer); one already in $(VENV) is kept
#   TRITON=0            leave Triton out
#   JOBS=4              processes that share the tests (auto: one a core)
#   ARGS="--seed 1"     more arguments for the demo, or for pytest
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= 1
JOBS ?= auto
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-build-isolation --editable
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard cmake/* csrc/*/*)
CPP := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench report clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10
	@echo 'options:'; sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.package ## train 96 sub-models at once, draw, select, export
	$(BIN)/sorted-kernels demo $(ARGS)

test: $(VENV)/.test ## run the tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.lint ## lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.lint ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.test ## run the CPU benchmarks into runs/bench
	$(BIN)/python -m bench --out runs/bench --device cpu
	$(BIN)/python -m bench.plot runs/bench runs/bench/benchmarks.csv

report: $(VENV)/.test ## write the README's measured section from bench/results
	$(BIN)/python -m bench.report

clean: ## remove the environment and everything built
	rm -rf $(VENV) build *.egg-info sorted_kernels/*.so sorted_kernels/_build.json

# The tools that build the package, and PyTorch, whose headers and ABI it is built against.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; $(PYTHON) is not (set PYTHON=...)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
		{ echo "setting up $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install --upgrade pip "setuptools>=77" wheel cmake ninja "pybind11>=2.12"
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
		{ echo "installing $(TORCH)"; $(PIP) install "$(TORCH)"; }
	@$(BIN)/python -c 'import sys, torch; v = torch.__version__; \
		sys.exit(tuple(map(int, v.split(".")[:2])) < (2, 10) and f"error: torch {v} is too old; 2.10 is needed")'
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(SOURCES)
	@echo "building and installing the package"
	@$(INSTALL) ".[cli]"
	@$(BIN)/python -c 'from sorted_kernels.ops.promotion import manifest as m; b = m(); print( \
		"compiled: CPU and CUDA kernels" if b.get("cuda") else \
		"compiled: CPU kernels; no nvcc, so no CUDA kernels" if b else \
		"nothing compiled (no C++ compiler): pure Python")'
	@touch $@

# Which wish about Triton was met is part of the stamp's name: the other wish makes it anew.
$(VENV)/.triton-$(TRITON): $(VENV)/.tools
	@if [ "$(TRITON)" = 0 ]; then \
		echo "Triton left out: its tests will be skipped"; \
	elif ! $(BIN)/python -c 'import triton' 2>/dev/null; then \
		echo "installing Triton"; \
		$(PIP) install "triton==3.7.1" || echo "no Triton for this machine: its tests will be skipped"; \
	fi
	@touch $@

$(VENV)/.test: $(VENV)/.package $(VENV)/.triton-$(TRITON)
	@$(INSTALL) ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	@$(INSTALL) ".[lint]"
	@touch $@
