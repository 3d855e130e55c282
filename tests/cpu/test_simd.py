"""The vectors of `csrc/cpu` on each instruction set: of this machine, of x86 without AVX2, and of aarch64.

`simd_test.cpp` compares them with plain loops. aarch64 needs Debian's `g++-aarch64-linux-gnu` and `qemu-user`.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

SOURCE = Path(__file__).with_name("simd_test.cpp")
TOOLCHAIN = runpy.run_path(str(SOURCE.parents[2] / "csrc" / "toolchain.py"))
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 machine")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Returns a function that compiles the program, at most once for each compiler and set of flags."""
    made = {}

    def compiled(compiler, *flags):
        if shutil.which(compiler) is None:
            pytest.skip(f"needs {compiler}")
        if (compiler, flags) not in made:
            path = tmp_path_factory.mktemp("simd") / "program"
            command = [compiler, *TOOLCHAIN["FLAGS"], "-Wno-unused-value", *flags, str(SOURCE), "-o", str(path)]
            done = subprocess.run(
                [*command, *(f"-I{folder}" for folder in include_paths())], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            made[compiler, flags] = path
        return made[compiler, flags]

    return compiled


def result(*command, capability=""):
    """Returns what the program prints."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@x86
@pytest.mark.parametrize(("capability", "level"), [("", 4), ("avx2", 3), ("default", 2)])
def test_vectors_on_x86(program, capability, level):
    """ATEN_CPU_CAPABILITY limits the instruction set, as it limits PyTorch's; AddressSanitizer watches."""
    printed = result(program("g++", *TOOLCHAIN["VARIANTS"]["sanitized"]), capability=capability)
    assert int(printed.split("level ")[1][0]) <= level
    assert "vectors of 32 bytes" in printed


@x86
def test_vectors_of_other_processors_on_x86(program):
    assert "level 0, vectors of 16 bytes" in result(program("g++", *TOOLCHAIN["VARIANTS"]["portable"]))


@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64")
def test_vectors_on_aarch64(program):
    path = program("aarch64-linux-gnu-g++", "-static")
    assert "level 0, vectors of 16 bytes" in result("qemu-aarch64", path)
