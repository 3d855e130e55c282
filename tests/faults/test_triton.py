"""A Triton that is damaged, or whose kernel cannot start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED

ROOT = Path(__file__).parents[2]
CODE = """
import torch, visattn_fast as vf
print(vf.backends("cuda")["triton"].missing)
gate, x = vf.FastCBAM(16), torch.rand(2, 16, 4, 4, requires_grad=True)
gate(x).sum().backward()
print(vf.backends("cuda")["reference"].available)
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('libtriton.so: file too short')", "OSError: libtriton.so: file too short"),
        ("raise ImportError('cannot import name')", "ImportError: cannot import name"),
        ("", "does not load: "),  # a release without what the kernels use
    ],
)
def test_damaged_triton_is_named_and_the_rest_works(source, message, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert done.stdout.endswith("True\n")


@pytest.mark.interpreted
@pytest.mark.skipif(not INTERPRETED, reason="needs a kernel of Triton")
@pytest.mark.parametrize("name", ["FastSE", "FastECA", "FastCBAM"])
def test_launch_that_fails_reaches_the_caller(name, monkeypatch):
    """With Triton's own message. The reference serves on request, and the next launch that works gives the result."""
    from triton.runtime.interpreter import GridExecutor

    gate, x = getattr(vf, name)(16), torch.rand(2, 16, 5, 7)
    with torch.no_grad():
        wanted = gate(x)
        with monkeypatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", lambda *a, **k: _refuse())
            with pytest.raises(RuntimeError, match="out of resource: shared memory"):
                gate(x)
            with vf.use_backend("reference"):
                torch.testing.assert_close(gate(x), wanted)
        assert torch.equal(gate(x), wanted)


def _refuse():
    raise RuntimeError("out of resource: shared memory")
