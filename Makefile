# Every target sets up .venv first: Python's venv, the pinned packages of constraints.txt, the native kernels.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(wildcard csrc/*.h csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/plan.h)
CUDA_SOURCES := $(wildcard csrc/cuda/*.* csrc/cuda/emulation/*.*)
# Test processes. Threads of two of them share the cores, and wait asleep; the interpreter needs one thread each.
PROCESSES ?= 2

.PHONY: report test bench kernels evidence lint format ext-cuda gpu-check build clean

report: $(VENV)/built
	$(BIN)/visattn-fast report --seconds 1 --out report

test: $(VENV)/built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(PROCESSES)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) -m interpreted tests

bench: $(VENV)/built
	$(BIN)/python -m pytest bench --benchmark-only

kernels: $(VENV)/installed
	TRITON_INTERPRET=1 $(BIN)/python -m tools.traffic
	$(BIN)/python -m tools.compiled
	$(BIN)/python -m tools.emulation
	$(BIN)/python -m tools.cuda_objects

# The native CUDA kernels, where nvcc and a CUDA torch are: with that machine's own torch, and nothing to download.
# pip hides what compilers say, so that it only installs the Python code.
ext-cuda:
	VISATTN_BUILD_EXT=0 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	VISATTN_BUILD_CUDA=only $(PYTHON) setup.py build_ext --inplace --force
	$(PYTHON) -c "from visattn_fast import native; raise SystemExit(native.load(native.CUDA_LIBRARY))"

# What is proven of each kernel, and where: docs/internals/evidence.md.
evidence: $(VENV)/installed
	$(BIN)/python -m tools.ledger

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(CUDA_SOURCES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(CUDA_SOURCES)

# Where the GPU is: with that machine's own torch and pytest, from this folder, and nothing to download, to install or to
# compile. `make ext-cuda` comes first.
gpu-check:
	$(PYTHON) -m tools.gpu_check

build: $(VENV)/installed
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info visattn_fast/*.so

# torch comes first: the native kernels are compiled against it, without build isolation.
$(VENV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	VISATTN_BUILD_EXT=0 $(PIP) --no-build-isolation --editable .[dev]
	touch $@

$(VENV)/built: $(VENV)/installed setup.py csrc/toolchain.py $(SOURCES)
	VISATTN_BUILD_EXT=1 $(PIP) --no-build-isolation --no-deps --editable .
	touch $@
