# Most targets set up .venv first: Python's venv, the pinned packages of constraints.txt, and what they need of the native
# kernels. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(wildcard csrc/common/*.h csrc/common/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/python/*.cpp)
CUDA_SOURCES := $(wildcard csrc/cuda/*.* csrc/cuda/emulation/*.*)
FORMATTED := $(SOURCES) $(CUDA_SOURCES) tests/cpu/simd_test.cpp tests/faults/failing_malloc.c
# Test processes. Threads of two of them share the cores, and wait asleep; the interpreter needs one thread each.
PROCESSES ?= 2

.PHONY: help report test sanitize portable determinism fuzz matrix bench kernels evidence names docs lint format ext-cuda gpu-check build sbom clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

report: $(VENV)/built ## compare eager, torch.compile and fused on this machine: report/report.html
	$(BIN)/visattn-fast report --seconds 1 --out report

test: $(VENV)/built ## run all tests, then those of the Triton kernels under the interpreter
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $(PROCESSES)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) -m interpreted tests

# Tests that run every native CPU kernel; the test of the backends fails if the library does not load.
KERNEL_TESTS := tests/backends/test_backends.py::test_cpu_has_kernels_to_test tests/cpu tests/ops tests/modules/test_parity.py \
  tests/modules/test_activations_and_biases.py tests/modules/test_derivatives.py tests/modules/test_bam.py tests/modules/test_gam.py \
  tests/modules/test_sk.py tests/modules/test_soca.py tests/modules/test_split_attention.py tests/modules/test_triplet_attention.py \
  tests/modules/test_window_attention.py tests/modules/test_self_attention.py tests/modules/test_mixed_precision.py
PRELOAD = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)"

# Leaks are not looked for: Python and torch keep memory until they end. LLVM in triton brings its own signal stacks.
sanitize: $(VENV)/installed ## run the CPU kernels' tests with AddressSanitizer and UBSan
	VISATTN_BUILD_VARIANT=sanitized $(BIN)/python setup.py --quiet build_ext
	$(PRELOAD) ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:quarantine_size_mb=64:use_sigaltstack=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  VISATTN_LIBRARY=$(CURDIR)/build/sanitized/_C.so OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	  $(BIN)/python -m pytest --numprocesses $(PROCESSES) $(KERNEL_TESTS) --ignore tests/cpu/test_headers.py --ignore tests/cpu/test_simd.py

portable: $(VENV)/built ## run the CPU kernels' tests as other processors, and x86 without AVX2, run them
	VISATTN_BUILD_VARIANT=portable $(BIN)/python setup.py --quiet build_ext
	VISATTN_LIBRARY=$(CURDIR)/build/portable/_C.so $(BIN)/python -m pytest --numprocesses $(PROCESSES) $(KERNEL_TESTS)
	ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest --numprocesses $(PROCESSES) $(KERNEL_TESTS)
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest --numprocesses $(PROCESSES) $(KERNEL_TESTS)

# Goes on where it was interrupted. `make fuzz FUZZ="--examples 500 --again"` starts a small run anew.
fuzz: $(VENV)/built ## run 20,000 random cases against float64, crashes caught
	OMP_WAIT_POLICY=passive $(BIN)/python -m tools.fuzz $(FUZZ)

determinism: $(VENV)/built ## run every module 100 times, with several numbers of threads; compare the bits
	OMP_WAIT_POLICY=passive $(BIN)/python -m tools.determinism

# Each cell needs 6 GB in build/matrix and about an hour. `make matrix MATRIX="--cell py3.13-torch2.15.0 -- tests/ops"` runs a part.
matrix: $(VENV)/built ## run all tests on every supported pair of Python and torch
	$(BIN)/python -m tools.matrix --processes $(PROCESSES) $(MATRIX)

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
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/python -m tools.prose

format: $(VENV)/installed ## apply what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# Uses the machine's own torch and pytest, from this folder; downloads, installs and compiles nothing. Run `make ext-cuda`
# first.
gpu-check: ## run device tests and benchmarks on a GPU, into bench/results/
	$(PYTHON) -m tools.gpu_check

build: $(VENV)/installed ## build a source distribution and a wheel
	$(BIN)/python -m build

# The tool has an environment of its own, so that it lists the wheel's alone and tests do not meet its packages.
sbom: build ## write dist/visattn_fast.cdx.json, a list of the wheel and of all that it depends on
	$(PYTHON) -m venv --clear --without-pip build/sbom/wheel
	$(PYTHON) -m venv --clear build/sbom/tool
	build/sbom/tool/bin/pip --python build/sbom/wheel/bin/python install --quiet --constraint constraints.txt dist/*.whl
	build/sbom/tool/bin/pip install --quiet --constraint constraints.txt cyclonedx-bom
	build/sbom/tool/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file dist/visattn_fast.cdx.json build/sbom/wheel/bin/python

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
