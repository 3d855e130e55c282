# Most targets set up .venv first: Python's venv, the pinned packages of constraints.txt, and what they need of the native
# kernels. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(wildcard csrc/common/*.h csrc/common/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/python/*.cpp)
CUDA_SOURCES := $(wildcard csrc/cuda/*.* csrc/cuda/emulation/*.*)
# Test processes. Threads of two of them share the cores, and wait asleep; the interpreter needs one thread each.
PROCESSES ?= 2

.PHONY: help report test bench kernels evidence names docs lint format ext-cuda gpu-check build clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

report: $(VENV)/built ## compare eager, torch.compile and fused on this machine: report/report.html
	$(BIN)/visattn-fast report --seconds 1 --out report

test: $(VENV)/built ## run all tests, then those of the Triton kernels under the interpreter
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(PROCESSES)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) -m interpreted tests

bench: $(VENV)/built ## run the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only

kernels: $(VENV)/installed ## print what each Triton and CUDA kernel moves and compiles to; needs no GPU
	TRITON_INTERPRET=1 $(BIN)/python -m tools.traffic
	$(BIN)/python -m tools.compiled
	$(BIN)/python -m tools.emulation
	$(BIN)/python -m tools.cuda_objects

# Uses the machine's own torch and downloads nothing. pip hides what compilers say, so it only installs the Python code.
ext-cuda: ## build the native CUDA kernels; needs nvcc and a CUDA torch
	VISATTN_BUILD_EXT=0 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	VISATTN_BUILD_CUDA=only $(PYTHON) setup.py build_ext --inplace --force
	$(PYTHON) -c "from visattn_fast import native; raise SystemExit(native.load(native.CUDA_LIBRARY))"

evidence: $(VENV)/installed ## write docs/internals/evidence.md from the tests, the tools and bench/results/
	$(BIN)/python -m tools.ledger

names: $(VENV)/installed ## write the lists of public names from each file's __all__
	$(BIN)/python -m tools.names

# A broken link is an error. Nothing is downloaded.
docs: $(VENV)/installed ## build the documentation site: site/index.html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs site

lint: $(VENV)/installed ## ruff, mypy, clang-format, the English of docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(CUDA_SOURCES)
	$(BIN)/python -m tools.prose

format: $(VENV)/installed ## apply what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(CUDA_SOURCES)

# Uses the machine's own torch and pytest, from this folder; downloads, installs and compiles nothing. Run `make ext-cuda`
# first.
gpu-check: ## run device tests and benchmarks on a GPU, into bench/results/
	$(PYTHON) -m tools.gpu_check

build: $(VENV)/installed ## build a source distribution and a wheel
	$(BIN)/python -m build

clean: ## remove .venv and every build output
	rm -rf $(VENV) build dist site *.egg-info visattn_fast/*.so visattn_fast/reference/*.so

# torch first: without build isolation, the native kernels are compiled against it.
$(VENV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	VISATTN_BUILD_EXT=0 $(PIP) --no-build-isolation --editable .[dev]
	$(PIP) --no-deps ultralytics
	touch $@

$(VENV)/built: $(VENV)/installed setup.py csrc/toolchain.py $(SOURCES)
	VISATTN_BUILD_EXT=1 $(PIP) --no-build-isolation --no-deps --editable .
	touch $@
