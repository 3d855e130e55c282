"""Builds the optional native library. Without torch or a C++ compiler a pure-Python install comes out.

VISATTN_BUILD_EXT=1 makes a failed build an error, VISATTN_BUILD_EXT=0 skips it. VISATTN_BUILD_CUDA=1 builds the CUDA
library as well, with nvcc of CUDA_HOME or of the path, for TORCH_CUDA_ARCH_LIST; if that fails, the rest is there.
VISATTN_BUILD_CUDA=only builds nothing else, and a failure is an error.
"""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("VISATTN_BUILD_EXT", "")
CUDA_CHOICE = os.environ.get("VISATTN_BUILD_CUDA", "0")
# 9.0a would be the same code; and PTX of 9.0, where that is asked for, also serves later chips.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
NVCC_FLAGS = [flag for flag in FLAGS if flag.startswith(("-std", "-O"))]
NVCC_FLAGS += ["--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["--diag-suppress=128"]  # loops that some instances of a template have no turn of
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # PyTorch 2.11: one library serves it and all later ones


def give_up(why: str, library: str = "native") -> None:
    """Says why there is no native library, or stops if one is demanded."""
    if CUDA_CHOICE == "only" or (CHOICE == "1" and library == "native"):
        raise RuntimeError(f"the {library} library was asked for, but {why}")
    print(f"visattn_fast: installing without the {library} library: {why}", file=sys.stderr)


def extensions() -> list[Extension]:
    """The native library: plain shared code that torch.ops.load_library loads, not a Python module."""
    if CHOICE == "0" and CUDA_CHOICE != "only":
        return []
    if find_spec("torch") is None:
        give_up("torch is not installed here (pip install --no-build-isolation uses the installed one)")
        return []
    headers = [*sorted(glob("csrc/cpu/*.h")), "csrc/cuda/plan.h"]
    found = {"_C": (sorted(glob("csrc/cpu/*.cpp")), headers)}
    if CUDA_CHOICE in ("1", "only"):
        sources = sorted(glob("csrc/cuda/*.cu")) + sorted(glob("csrc/cuda/*.cpp"))  # what takes longest comes first
        found["_CUDA"] = sources, headers + sorted([*glob("csrc/cuda/*.cuh"), *glob("csrc/cuda/*.h")])
    return [
        Extension(f"visattn_fast.{name}", sources, depends=depends, language="c++", extra_compile_args=FLAGS)
        for name, (sources, depends) in found.items()
        if name == "_CUDA" or CUDA_CHOICE != "only"
    ]


def gencode(architectures: str) -> list[str]:
    """nvcc's flags for a list like ``8.0;9.0a;10.0+PTX``."""
    flags = []
    for name in architectures.replace(",", ";").replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * name.endswith("+PTX")
        flags += [flag for code in codes if number for flag in ("-gencode", f"arch=compute_{number},code={code}")]
    return flags


def use_cuda(extension: Extension) -> str:
    """Adds the CUDA runtime, linked statically; returns nvcc."""
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("the CUDA library needs a torch that is built with CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]  # None: the path
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None:
        raise RuntimeError("the CUDA library needs nvcc: set CUDA_HOME")
    homes = [home] if home else [os.path.dirname(os.path.dirname(os.path.realpath(nvcc))), "/usr/local/cuda"]
    home = next((h for h in homes if os.path.exists(os.path.join(h, "include", "cuda_runtime.h"))), homes[0])
    extension.include_dirs.append(os.path.join(home, "include"))
    extension.library_dirs += [os.path.join(home, folder) for folder in ("lib64", "lib")]
    extension.libraries += ["torch_cuda", "cudart_static", "rt", "dl", "pthread"]
    extension.define_macros.append(("USE_CUDA", None))
    return nvcc


def use_torch(extension: Extension) -> None:
    """Adds the paths and libraries of the installed torch."""
    import torch
    from torch.utils import cpp_extension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise RuntimeError(f"the native library needs torch >= 2.11, found {torch.__version__}")
    extension.include_dirs += cpp_extension.include_paths()
    extension.library_dirs += cpp_extension.library_paths()
    extension.libraries.append("torch_cpu")
    extension.define_macros.append(STABLE_ABI)


class BuildNative(build_ext):
    """Builds the library on all cores; a failure leaves a pure-Python install behind."""

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"  # no interpreter's tag: it knows nothing of Python

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        wanted, self.extensions, self.nvcc = self.extensions, [], None
        built, compiler = [], self.compiler  # its name, of which a run makes an object
        for extension in wanted:
            self.extensions, self.compiler = [extension], compiler
            try:
                use_torch(extension)
                if extension.name.endswith("_CUDA"):
                    self.nvcc = use_cuda(extension)
                super().run()
                built.append(extension)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                give_up(why, "CUDA" if extension.name.endswith("_CUDA") else "native")
        self.extensions = built

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_cuda(source, output_dir, include_dirs=(), macros=(), **_):
            made = os.path.join(output_dir, os.path.splitext(source)[0] + ".o")
            macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in macros]
            paths = [f"-I{path}" for path in include_dirs]
            self.spawn([self.nvcc, *NVCC_FLAGS, *gencode(ARCHITECTURES), *macros, *paths, "-c", source, "-o", made])
            return [made]

        def compile_source(source, output_dir, **options):
            if source.endswith(".cu"):
                return compile_cuda(source, output_dir, **options)
            return compile_one([source], output_dir, **options)

        def compile_all(sources, output_dir=None, **options):
            for source in sources:
                os.makedirs(os.path.join(output_dir, os.path.dirname(source)), exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = pool.map(lambda source: compile_source(source, output_dir, **options), sources)
                return [name for part in parts for name in part]

        self.compiler.compile = compile_all
        self.compiler.src_extensions = [*{*self.compiler.src_extensions, ".cu"}]
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_one


class PlatformWheel(bdist_wheel):
    """A wheel with the library serves every Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
