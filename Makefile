# make demo | test | test-long | lint | bench | api | build | clean. All of them set up .venv first (Python 3.11 or newer).
# make triton-report: the Triton kernels, compiled.
# make cuda-report | cuda-build | test-gpu | bench-gpu: the CUDA kernels; all but the first in .venv-cuda, with CUDA's torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.14.1
CHECK ?=

# Modules that are no API, or need what may not be there.
HIDDEN := '!manifold_kernels.triton' '!manifold_kernels.__main__' '!manifold_kernels._C' '!manifold_kernels.demo'

BIN := .venv/bin
CUDA_BIN := .venv-cuda/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') setup.py pyproject.toml
CUDA_SOURCES := $(shell find csrc -name '*.cu' -o -name '*.cuh')
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test test-long lint bench api build clean triton-report cuda-report cuda-build gpu test-gpu bench-gpu

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

# What compilers make of the Triton kernels for GPUs that are not there.
triton-report: .venv/base .venv/dev
	PYTHONPATH=. $(BIN)/python tests/triton_compiled.py --all sm_80 sm_90 sm_100 gfx942 | $(BIN)/python bench/triton_report.py

# What nvcc makes of the kernels for GPUs that are not there. Needs nvcc.
cuda-report: .venv/base .venv/dev
	$(BIN)/python bench/cuda_report.py

# The whole extension against a torch built for CUDA, installed and imported. Needs nvcc, no GPU.
cuda-build: .venv-cuda/built
	$(CUDA_BIN)/python tests/cuda_built.py
	$(CUDA_BIN)/manifold-kernels info

# Before anything is installed: a machine without a GPU is told so at once.
gpu:
	@nvidia-smi --list-gpus 2> /dev/null || { echo "make: wanted an NVIDIA GPU, got none: nvidia-smi finds none"; exit 1; }

test-gpu: gpu .venv-cuda/built .venv-cuda/dev
	$(CUDA_BIN)/pytest tests/test_gpu_kernels.py
	compute-sanitizer --tool memcheck --error-exitcode 1 $(CUDA_BIN)/pytest tests/test_gpu_kernels.py -k "test_views or test_filters"
	compute-sanitizer --tool racecheck --error-exitcode 1 $(CUDA_BIN)/pytest tests/test_gpu_kernels.py -k "test_filters"

bench-gpu: gpu .venv-cuda/built
	$(CUDA_BIN)/manifold-kernels bench --device cuda --json results/bench-gpu.json

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

.venv-cuda/base: requirements.txt
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv .venv-cuda
	$(CUDA_BIN)/python -m pip install --quiet "$(TORCH_CUDA)" -r requirements.txt
	touch $@

# CUDA's torch brings the Triton that it was built with.
.venv-cuda/dev: .venv-cuda/base requirements-dev.txt
	grep -v '^triton' requirements-dev.txt > .venv-cuda/requirements-dev.txt
	$(CUDA_BIN)/python -m pip install --quiet -r .venv-cuda/requirements-dev.txt
	touch $@

# Installed, not in place: the extension that lies in manifold_kernels/ belongs to .venv.
.venv-cuda/built: .venv-cuda/base $(SOURCES) $(CUDA_SOURCES) $(shell find manifold_kernels -name '*.py')
	$(CUDA_BIN)/python -m pip install --no-build-isolation --no-deps .
	touch $@
