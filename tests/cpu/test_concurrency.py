"""The native CPU kernels with many threads, from many threads, and in forked processes."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import visattn_fast as vf
from cases import TARGETS, RecordedOps, entries, feature_map, layouts, threads

pytestmark = pytest.mark.skipif(("cpu", "cpp") not in TARGETS, reason="needs the native library")
ROOT = Path(__file__).parents[2]
# A map that several threads share, and images that they share out; both have more than `for_images` leaves to one.
SHAPES = [(1, 32, 19, 21), (3, 32, 19, 21)]


def forward_and_backward(module, x):
    """Returns y and the gradients of x and the parameters, without a change of any ``.grad``."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def bits_equal(first, second):
    """True if two lists of tensors are equal."""
    return all(map(torch.equal, first, second)) and len(first) == len(second)


@entries
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=["1 image", "3 images"])
def test_threads_do_not_change_any_op(entry, layout, shape):
    """Every op of every module, forward and backward, gives the same bits with 1, 2, 3 and 8 threads.

    The ops run again with the arguments that the module gave them. PyTorch's layers between them stay out, and so do
    ops without a native kernel, of criss-cross, self- and map attention: the sums of PyTorch's products depend on the
    number of threads.
    """
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    module = entry.pair(shape[1])[0]
    with vf.use_backend("cpp"), RecordedOps() as recorded:
        forward_and_backward(module, feature_map(shape, layout, torch.float32))
    native = [c for c in recorded.calls if torch._C._dispatch_has_kernel_for_dispatch_key(c[0].name(), "CPU")]
    assert native or entry.name in ("criss_cross", "self_attention", "map_attention", "map_attention_eval")
    for op, arguments in native:
        runs = []
        for count in (1, 2, 3, 8):
            own = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            with threads(count), vf.use_backend("cpp"), torch.no_grad():
                result = op(*own)
            runs.append([t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)])
        for count, run in zip((2, 3, 8), runs[1:], strict=True):
            assert bits_equal(runs[0], run), f"{op} with {count} threads"


@entries
def test_many_threads_may_call_one_module(entry):
    """Eight threads that run one module at a time get the bits that they get one after the other."""
    module = entry.pair(32)[0].eval()
    maps = [feature_map((2, 32, 9, 11), "nchw", torch.float32, seed=seed) for seed in range(16)]
    # PyTorch may hang as threads create the accumulator of one parameter (docs/guide/backends.md).
    alive = [p.view_as(p) for p in module.parameters()]
    with threads(1), vf.use_backend("cpp"):
        alone = [forward_and_backward(module, x) for x in maps]

    def call(x):
        torch.set_num_threads(1)  # a setting of each thread
        with vf.use_backend("cpp"):
            return forward_and_backward(module, x)

    with threads(1), ThreadPoolExecutor(8) as pool:
        together = list(pool.map(call, maps * 4))
    assert all(bits_equal(alone[i % len(maps)], result) for i, result in enumerate(together))
    assert len(alive) == len(list(module.parameters()))


def python(code: str) -> str:
    """Returns what ``code`` prints in a new process within two minutes."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_forked_process_computes_with_one_thread():
    """After parallel work of the parent, a child with one thread computes the same bits.

    With several threads it waits for ever, as with plain PyTorch: the threads of GCC's OpenMP do not survive a fork.
    """
    code = """
import os, torch
from visattn_fast import catalogue
torch.set_num_threads(2)
modules = [entry.pair(32)[0].eval() for entry in catalogue.ENTRIES.values() if not entry.has_torch_layers]
x = torch.rand(4, 32, 19, 21).requires_grad_()
def run():
    results = []
    for module in modules:
        y = module(x)
        results += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]
    return results
before = run()
child = os.fork()
if not child:
    try:
        torch.set_num_threads(1)
        os._exit(0 if all(map(torch.equal, before, run())) else 1)
    finally:
        os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code) == "0"


def test_workers_of_a_data_loader_may_call_a_gate():
    code = """
import torch, visattn_fast as vf
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(2)
gate, x = vf.FastCBAM(16).eval().requires_grad_(False), torch.rand(4, 16, 31, 29)
class Gated(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return gate(x[i : i + 1])[0]
whole = gate(x)
for _ in range(2):
    found = torch.cat(list(DataLoader(Gated(), num_workers=2, multiprocessing_context="fork", timeout=60)))
    print(torch.equal(found, whole))
"""
    assert python(code) == "True\nTrue"
