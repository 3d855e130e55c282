"""Without a compiler, or with a broken one, the install is pure Python and says so; a demanded build fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = {
    "missing": None,
    "failing": "#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n",
    "killed": "#!/bin/sh\nkill -9 $$\n",
    "writing nothing": "#!/bin/sh\nexit 0\n",
}


def built(tmp_path: Path, compiler: str, choice: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with the compiler, into a folder of its own."""
    path = tmp_path / "c++"
    if COMPILERS[compiler]:
        path.write_text(COMPILERS[compiler])
        path.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VISATTN")}
    environment |= {"CC": str(path), "CXX": str(path), "VISATTN_BUILD_EXT": choice, "CCACHE_DISABLE": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "o"]
    return subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_install_goes_on_without_the_library(compiler, tmp_path):
    done = built(tmp_path, compiler, "")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    if compiler != "writing nothing":
        assert done.stderr.count("visattn_fast: installing without the native library: ") == 2


@pytest.mark.parametrize("compiler", COMPILERS)
def test_demanded_build_fails(compiler, tmp_path):
    done = built(tmp_path, compiler, "1")
    assert done.returncode != 0
    assert "the native library was asked for, but " in done.stderr
