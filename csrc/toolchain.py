"""The flags that setup.py compiles with, the paths of torch and CUDA, and the call of nvcc."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

from setuptools import Extension

# 9.0a gives the same code, but its PTX would not serve later chips.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"
_EVERYWHERE = ["-std=c++20", "-O3"]
FLAGS = [*_EVERYWHERE, "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]
# Builds of the CPU library for tests: name -> flags. `make sanitize` and `make portable` run tests with them.
# With the checks left out, most of them of a lambda's captures, GCC takes more than twice as long.
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_SANITIZERS += ["-fno-sanitize=null,alignment,vptr,object-size", "-fno-sanitize-address-use-after-scope"]
VARIANTS = {
    "sanitized": [*_SANITIZERS, "--param=asan-instrumentation-with-call-threshold=0", "-O1", "-g1"],
    "portable": ["-DVISATTN_PORTABLE"],
}
NVCC_FLAGS = [*_EVERYWHERE, "--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["--diag-suppress=128"]  # loops that never run in some instances of a template
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020b000000000000")  # PyTorch 2.11: one library serves it and all later ones


def nvcc_command(
    nvcc: str, source: str, made: str, include_dirs: Sequence[str] = (), macros: Sequence[Any] = (), **_: Any
) -> list[str]:
    """Returns the command that compiles one source for the architectures in ARCHITECTURES."""
    defines = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in macros]
    paths = [f"-I{path}" for path in include_dirs]
    return [nvcc, *NVCC_FLAGS, *gencode(ARCHITECTURES), *defines, *paths, "-c", source, "-o", made]


def gencode(architectures: str) -> list[str]:
    """Returns nvcc's flags for a list like ``8.0;9.0a;10.0+PTX``."""
    flags = []
    for name in architectures.replace(",", ";").replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * name.endswith("+PTX")
        flags += [flag for code in codes if number for flag in ("-gencode", f"arch=compute_{number},code={code}")]
    return flags


def use_cuda(extension: Extension) -> str:
    """Adds the CUDA runtime, linked statically, to an extension; returns the path of nvcc."""
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
    """Adds the paths and libraries of the installed torch to an extension."""
    import torch
    from torch.utils import cpp_extension

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise RuntimeError(f"the native library needs torch >= 2.11, found {torch.__version__}")
    extension.include_dirs += cpp_extension.include_paths()
    extension.library_dirs += cpp_extension.library_paths()
    extension.libraries.append("torch_cpu")
    extension.define_macros.append(STABLE_ABI)
