"""Builds the optional native library. Without torch or a C++ compiler a pure-Python install comes out.

VISATTN_BUILD_EXT=1 makes a failed build an error, VISATTN_BUILD_EXT=0 skips it.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("VISATTN_BUILD_EXT", "")
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
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # PyTorch 2.11: one library serves it and all later ones


def give_up(why: str) -> None:
    """Says why there is no native library, or stops if one is demanded."""
    if CHOICE == "1":
        raise RuntimeError(f"VISATTN_BUILD_EXT=1, but {why}")
    print(f"visattn_fast: installing pure Python, without the native library: {why}", file=sys.stderr)


def extensions() -> list[Extension]:
    """The native library: plain shared code that torch.ops.load_library loads, not a Python module."""
    if CHOICE == "0":
        return []
    if find_spec("torch") is None:
        give_up("torch is not installed here (pip install --no-build-isolation uses the installed one)")
        return []
    sources, headers = sorted(glob("csrc/cpu/*.cpp")), sorted(glob("csrc/cpu/*.h"))
    return [Extension("visattn_fast._C", sources, depends=headers, language="c++", extra_compile_args=FLAGS)]


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
        try:
            for extension in self.extensions:
                use_torch(extension)
            super().run()
        except Exception as error:
            give_up(f"{type(error).__name__}: {error}")
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources, output_dir=None, **options):
            for source in sources:
                os.makedirs(os.path.join(output_dir, os.path.dirname(source)), exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = pool.map(lambda source: compile_one([source], output_dir, **options), sources)
                return [name for part in parts for name in part]

        self.compiler.compile = compile_all
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """A wheel with the library serves every Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel})
