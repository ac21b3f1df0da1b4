# make demo | test | test-long | lint | bench | api | build | clean. All of them set up .venv first (Python 3.11 or newer).
PYTHON ?= python3
TORCH ?= torch==2.13.0
CHECK ?=

# Modules that are no API, or need what may not be there.
HIDDEN := '!manifold_kernels.triton' '!manifold_kernels.__main__' '!manifold_kernels._C' '!manifold_kernels.demo'

BIN := .venv/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test test-long lint bench api build clean

build: .venv/built

# Threads that wait without spinning: on two cores the operating system needs them for others, too.
demo: .venv/built
	OMP_WAIT_POLICY=PASSIVE $(BIN)/manifold-kernels train $(if $(CHECK),--check)

test: .venv/built .venv/dev
	$(BIN)/python -m pytest -m "not long"
	$(BIN)/python -m pytest --doctest-modules manifold_kernels

test-long: .venv/built .venv/dev
	$(BIN)/python -m pytest
	$(BIN)/manifold-kernels validate

lint: .venv/base .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

bench: .venv/built .venv/dev
	$(BIN)/manifold-kernels bench --peers --plots results/bench

# The API reference in docs/api, from the docstrings.
api: .venv/built .venv/dev
	$(BIN)/pdoc --docformat restructuredtext --output-directory docs/api manifold_kernels $(HIDDEN)

clean:
	rm -rf build dist results docs/api *.egg-info manifold_kernels/_C*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f .venv/built

.venv/base: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)" -r requirements.txt
	touch $@

.venv/dev: .venv/base requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The kernels again wherever their sources changed; Python files are used where they lie.
.venv/built: .venv/base $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
