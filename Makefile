# `make demo` and `make test` each do everything on their own: set-up, build, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
NATIVE := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h tests/*.cpp)
PYTHON_ROOMS := dp2vae_fast kernels tests benchmarks setup.py
PYTEST := $(BIN)/python -m pytest -q

.PHONY: setup demo test bench kernels lint types ci format clean

setup: $(BUILT)

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(BUILT): $(READY) setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[train,dev]'
	touch $@

demo: setup
	$(BIN)/dp2vae train --recipe digits --out runs/digits $(if $(wildcard runs/digits),--resume)

test: setup
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 tests

bench: setup
	$(BIN)/python benchmarks/bench_step.py --short

kernels: setup
	$(BIN)/python benchmarks/compile_kernels.py

lint: setup
	$(BIN)/ruff check $(PYTHON_ROOMS)
	$(BIN)/ruff format --check $(PYTHON_ROOMS)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

types: setup
	$(BIN)/pyright

# A kernel that does not compile must not pass for one that was left out, with its tests skipped.
ci: export DP2VAE_FAST_NATIVE = 1
ci: lint types kernels test

format: setup
	$(BIN)/ruff check --fix $(PYTHON_ROOMS)
	$(BIN)/ruff format $(PYTHON_ROOMS)
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build *.egg-info dp2vae_fast/_C*.so dp2vae_fast/_cuda*.so
