"""Builds the optional native library. Without torch or a C++ compiler the install is pure Python.

VISATTN_BUILD_EXT=1 makes a failed build an error, VISATTN_BUILD_EXT=0 skips it. VISATTN_BUILD_CUDA=1 also builds the
CUDA library, with nvcc of CUDA_HOME or of the path, for TORCH_CUDA_ARCH_LIST; if that fails, the rest is installed.
VISATTN_BUILD_CUDA=only builds nothing else, and a failure is an error. VISATTN_BUILD_VARIANT=sanitized or portable
builds nothing but build/<variant>/_C.so, the CPU library for tests: VISATTN_LIBRARY chooses it at run time.
"""

from __future__ import annotations

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from types import SimpleNamespace

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit("visattn_fast is built with setuptools >= 77: pip install --upgrade setuptools") from None

TOOLCHAIN = SimpleNamespace(**runpy.run_path(os.path.join(os.path.dirname(__file__), "csrc", "toolchain.py")))
CHOICE = os.environ.get("VISATTN_BUILD_EXT", "")
CUDA_CHOICE = os.environ.get("VISATTN_BUILD_CUDA", "0")
VARIANT = os.environ.get("VISATTN_BUILD_VARIANT", "")


def give_up(why: str, library: str = "native") -> None:
    """Prints why there is no native library, or raises if it is demanded."""
    if CUDA_CHOICE == "only" or VARIANT or (CHOICE == "1" and library == "native"):
        raise RuntimeError(f"the {library} library was asked for, but {why}")
    print(f"visattn_fast: installing without the {library} library: {why}", file=sys.stderr)


def extensions() -> list[Extension]:
    """Returns the native libraries: shared objects for torch.ops.load_library, and one Python module."""
    if CHOICE == "0" and CUDA_CHOICE != "only":
        return []
    if find_spec("torch") is None:
        give_up("torch is not installed here (pip install --no-build-isolation uses the installed one)")
        return []
    common, shared = sorted(glob("csrc/common/*.h")), sorted(glob("csrc/common/*.cpp"))
    found = {
        "reference._layers": (["csrc/python/layers.cpp"], []),
        "_C": (shared + sorted(glob("csrc/cpu/*.cpp")), common + sorted(glob("csrc/cpu/*.h"))),
    }
    if VARIANT:
        found = {"_C": found["_C"]}
    elif CUDA_CHOICE in ("1", "only"):
        sources = sorted(glob("csrc/cuda/*.cu")) + sorted(glob("csrc/cuda/*.cpp"))  # the slowest to compile come first
        found["_CUDA"] = sources + shared, common + sorted([*glob("csrc/cuda/*.cuh"), *glob("csrc/cuda/*.h")])
    extra = TOOLCHAIN.VARIANTS[VARIANT] if VARIANT else []
    options = {"extra_compile_args": TOOLCHAIN.FLAGS + extra, "extra_link_args": extra}
    return [
        Extension(f"visattn_fast.{name}", sources, depends=depends, language="c++", **options)
        for name, (sources, depends) in found.items()
        if name == "_CUDA" or CUDA_CHOICE != "only"
    ]


class BuildNative(build_ext):
    """Builds the libraries on all cores; after a failure the install is pure Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if VARIANT:
            self.build_temp = os.path.join("build", VARIANT)

    def get_ext_fullpath(self, ext_name: str) -> str:
        return os.path.join("build", VARIANT, "_C.so") if VARIANT else super().get_ext_fullpath(ext_name)

    def get_ext_filename(self, ext_name: str) -> str:
        return os.path.join(*ext_name.split(".")) + ".so"  # without an interpreter's tag: each serves all of them

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def run(self) -> None:
        wanted, self.extensions, self.nvcc = self.extensions, [], None
        built, compiler = [], self.compiler  # a name; a run replaces it by an object
        for extension in wanted:
            self.extensions, self.compiler = [extension], compiler
            try:
                if not extension.name.endswith("_layers"):
                    TOOLCHAIN.use_torch(extension)
                if extension.name.endswith("_CUDA"):
                    self.nvcc = TOOLCHAIN.use_cuda(extension)
                super().run()
                if not os.path.exists(self.get_ext_fullpath(extension.name)):
                    raise RuntimeError("the compiler wrote no library")
                built.append(extension)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                give_up(why, "CUDA" if extension.name.endswith("_CUDA") else "native")
        self.extensions = built

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_source(source, output_dir, **options):
            if source.endswith(".cu"):
                made = os.path.join(output_dir, os.path.splitext(source)[0] + ".o")
                self.spawn(TOOLCHAIN.nvcc_command(self.nvcc, source, made, **options))
                return [made]
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
    """Tags a wheel with the library for every Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
