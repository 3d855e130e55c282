"""Every C++ header includes what it uses: it compiles alone."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[2] / "csrc"
FLAGS = runpy.run_path(str(CSRC / "toolchain.py"))["FLAGS"]
HEADERS = [path.relative_to(CSRC).as_posix() for path in sorted(CSRC.rglob("*.h"))]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header):
    """With USE_CUDA, which declares PyTorch's streams and needs no CUDA toolkit."""
    command = ["g++", *FLAGS, "-fsyntax-only", "-w", "-DUSE_CUDA", *(f"-I{path}" for path in include_paths())]
    done = subprocess.run([*command, "-x", "c++", str(CSRC / header)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
