"""A native library that is damaged, of another version, or of another machine is named, and plain PyTorch serves."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import visattn_fast as vf
from visattn_fast import native

ROOT = Path(__file__).parents[2]
LIBRARY = native.build_of(native.LIBRARY)
CODE = """
import torch, visattn_fast as vf
gate = vf.FastSE(16)
x = torch.rand(2, 16, 4, 4)
torch.testing.assert_close(gate(x), vf.reference.se(x, *gate.weights()))
print(vf.backends("cpu")["cpp"].missing)
"""
needs_library = pytest.mark.skipif(not vf.backends("cpu")["cpp"].available, reason="needs the native library")


def said_of(library: Path) -> str:
    """Computes in a new process that is given ``library``; returns what it says against the library."""
    environment = os.environ | {"VISATTN_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def shared_object(source: str, path: Path) -> Path:
    """Compiles ``source`` into a shared object."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@needs_library
@pytest.mark.parametrize("part", [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.2, 0.5, 0.8, 0.95, 0.999])
def test_library_cut_short_is_not_loaded(part, tmp_path):
    """The dynamic linker would end the process."""
    whole = LIBRARY.read_bytes()
    path = tmp_path / "cut.so"
    path.write_bytes(whole[: int(part * len(whole))])
    assert "damaged or not of version" in said_of(path)


@needs_library
def test_library_of_another_version_is_not_loaded(tmp_path):
    """Its kernels may take other arguments, which the dispatcher hands over by position."""
    mark = f"visattn_fast library {vf.__version__}\0".encode()
    whole = LIBRARY.read_bytes()
    assert whole.count(mark) == 1
    path = tmp_path / "old.so"
    path.write_bytes(whole.replace(mark, mark.replace(vf.__version__.encode(), b"9" * len(vf.__version__))))
    assert f"damaged or not of version {vf.__version__}" in said_of(path)


@needs_library
def test_library_of_another_processor_is_named(tmp_path):
    whole = bytearray(LIBRARY.read_bytes())
    struct.pack_into("<H", whole, 0x12, 0xBEEF)  # the field of the machine
    path = tmp_path / "foreign.so"
    path.write_bytes(whole)
    assert "the native library does not load: " in said_of(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF", b"\x7fELF\2\1" + bytes(40)])
def test_file_that_is_no_library_is_not_loaded(content, tmp_path):
    path = tmp_path / "other.so"
    path.write_bytes(content)
    assert "damaged or not of version" in said_of(path)


def test_folder_or_nothing_in_place_of_the_library_is_named(tmp_path):
    assert "Is a directory" in said_of(tmp_path)
    assert "was not built" in said_of(tmp_path / "missing.so")


def test_library_of_someone_else_is_not_loaded(tmp_path):
    path = shared_object("#include <cstdlib>\nstatic int i = (abort(), 0);", tmp_path / "other.so")
    assert "damaged or not of version" in said_of(path)


def test_library_that_needs_another_torch_is_named(tmp_path):
    """With the reason of the dynamic linker: the symbol that this torch lacks."""
    mark = f'extern "C" const char mark[] = "visattn_fast library {vf.__version__}";'
    source = f'{mark} extern "C" int torch_of_next_year(); static int i = torch_of_next_year();'
    assert "torch_of_next_year" in said_of(shared_object(source, tmp_path / "new.so"))
