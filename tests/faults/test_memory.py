"""Out of memory inside the native kernels: an exception, and the next call computes as before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cases import TARGETS

ROOT = Path(__file__).parents[2]
CODE = """
import ctypes, torch
from visattn_fast import catalogue, native
import visattn_fast as vf
assert native.load() is None
process, library = ctypes.CDLL(None), ctypes.CDLL(str(native.build_of(native.LIBRARY)))
process.fail_malloc.argtypes = ctypes.c_void_p, ctypes.c_long
inside = ctypes.addressof(ctypes.c_char.in_dll(library, "visattn_fast_version"))

def run(module, x):
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]

failed = 0
for threads in (1, 2):
    torch.set_num_threads(threads)
    for entry in catalogue.ENTRIES.values():
        for layout in catalogue.LAYOUTS:
            module = entry.pair(32)[0].eval()
            x = catalogue.feature_map((3, 32, 19, 21), layout).requires_grad_()
            wanted = run(module, x)
            process.fail_malloc(inside, -1)
            run(module, x)
            for number in range(1, process.malloc_calls() + 1):
                process.fail_malloc(inside, number)
                try:
                    run(module, x)
                except (MemoryError, RuntimeError) as error:
                    assert "alloc" in str(error) or "memory" in str(error), (entry.name, str(error))
                    failed += 1
                else:
                    raise AssertionError((entry.name, layout, number, "no exception"))
            process.fail_malloc(None, 0)
            assert all(map(torch.equal, run(module, x), wanted)), (entry.name, layout)
print(failed)
"""


@pytest.mark.skipif(("cpu", "cpp") not in TARGETS, reason="needs the native library")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_every_allocation_of_the_kernels_may_fail(tmp_path):
    """One after the other, forward and backward, with one thread and with two, over the whole catalogue."""
    source, preloaded = Path(__file__).with_name("failing_malloc.c"), tmp_path / "failing_malloc.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", str(source), "-o", str(preloaded), "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(preloaded), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


def test_no_kernel_hides_what_failed_in_a_thread():
    """PyTorch's loop replaces an exception by one that names neither the failure nor the kernel."""
    sources = [path for path in (ROOT / "csrc" / "cpu").iterdir() if path.name != "parallel.h"]
    assert not [path.name for path in sources if "stable::parallel_for" in path.read_text()]
