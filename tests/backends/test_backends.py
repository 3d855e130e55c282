"""The choice of a backend for a call, its reasons, and what importing the package loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED, TARGETS, feature_map
from visattn_fast.backends import NAMES, select

PACKAGE = Path(vf.__file__).parent


def python(code: str, path: Path = PACKAGE.parent) -> str:
    """Returns what ``code`` prints in a new process that imports the package from ``path``."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.interpreted
def test_cpu_has_kernels_to_test():
    """Without kernels the parity tests would have no cases, and pass."""
    assert ("cpu", "triton" if INTERPRETED else "cpp") in TARGETS


@pytest.mark.interpreted
def test_auto_prefers_kernels():
    with vf.use_backend("auto"):
        assert select("cpu", torch.float32, "auto") == ("triton" if INTERPRETED else "cpp")
    if not INTERPRETED:
        assert select("cpu", torch.float16, "auto") == "reference"


def test_chosen_backend_that_cannot_serve_raises_all_reasons():
    x = feature_map((1, 16, 3, 3), "nchw", torch.float32)
    module = vf.FastSE(16)
    with vf.use_backend("cuda"), pytest.raises(RuntimeError) as caught:
        module(x)
    message = str(caught.value)
    assert "backend 'cuda' cannot serve torch.float32 on cpu" in message
    for name in NAMES:
        assert f"\n  {name}: " in message
    assert torch.isfinite(module(x)).all()  # the choice ends with its context


def test_choices_nest_and_survive_errors():
    x, module = feature_map((1, 16, 3, 3), "nchw", torch.float32), vf.FastSE(16)
    with vf.use_backend("cuda"):
        with vf.use_backend("reference"):
            module(x)
        with pytest.raises(RuntimeError, match="cannot serve"), vf.use_backend("cuda"):
            module(x)
        with pytest.raises(RuntimeError, match="cannot serve"):
            module(x)
    module(x)


def test_unknown_backend_raises():
    with pytest.raises(ValueError, match=r"backend must be one of .*got 'tensorrt'"), vf.use_backend("tensorrt"):
        pass


def test_unproven_and_slower_gpu_kernels_are_opt_in(monkeypatch):
    """Triton is opt-in on devices that have not run it yet; the native CUDA kernels are, since they are slower."""
    module = sys.modules["visattn_fast.backends"]  # the module; the package has a function of the same name
    for proven, chosen in (((), "reference"), (("cuda",), "triton")):
        monkeypatch.setattr(module, "_TRITON_PROVEN", proven)
        module._probe.cache_clear()
        assert bool(vf.backends("cuda")["triton"].opt_in) == (not proven)
        assert module._select.__wrapped__("cuda", torch.float32, "auto") == chosen
    module._probe.cache_clear()
    monkeypatch.setattr(module, "_missing_for_cuda", lambda device_type: ())
    native = module._probe.__wrapped__("cuda", "cuda")
    assert native.available
    assert native.opt_in


def test_native_cuda_kernels_share_the_dispatch_key_with_triton():
    """The native kernels serve while they are chosen, Triton's otherwise; a missing native kernel raises an error."""
    code = """
import torch
import visattn_fast
from visattn_fast.ops import library
def load():
    made = torch.library.Library("visattn_fast_cuda", "IMPL")
    made.impl("eca_fwd", lambda *args: args, "CUDA")
    kept.append(made)
kept, chosen = [], []
assert library.register_cuda(lambda: "not built", bool) == "not built"
assert not library._NATIVE
assert library.register_cuda(load, lambda: bool(chosen)) is None
native = torch.ops.visattn_fast_cuda.eca_fwd.default
assert library.cuda_kernel("eca_fwd", True) is native
assert library.cuda_kernel("eca_fwd", False) is native  # no other kernel is there
library.register_triton("CUDA")
assert library.cuda_kernel("eca_fwd", True) is native
assert library.cuda_kernel("eca_bwd", True).__module__ == "visattn_fast.kernels.ops.eca"  # behind a native forward
assert library.cuda_kernel("eca_fwd", False).__module__ == "visattn_fast.kernels.ops.eca"
for name in ("eca_fwd", "se_fwd"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("visattn_fast::" + name, "CUDA")
try:
    library.cuda_kernel("se_fwd", True)
except RuntimeError as error:
    print(error)
"""
    assert python(code) == "backend 'cuda' has no kernel for se_fwd; it has eca_fwd"


def test_import_loads_no_kernels_and_reads_no_environment():
    """The import loads neither triton nor the native library nor Dynamo."""
    code = """
import os, sys, torch
class Environment(dict):
    def read(self, key, *rest):
        if "TRITON" in key or "VISATTN" in key: raise AssertionError(key)
        return dict.get(self, key, *rest)
    get = __getitem__ = read
os.environ = Environment(os.environ)
import visattn_fast
loaded = [m for m in sys.modules if m.split(".")[0] in ("triton", "matplotlib", "rich", "numpy") and "." not in m]
print([m for m in loaded if m != "numpy"], "torch._dynamo" in sys.modules, list(torch.ops.loaded_libraries))
"""
    assert python(code) == "[] False []"


def test_package_without_kernels_computes_and_says_what_it_lacks(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "visattn_fast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    code = """
import sys
sys.modules["triton"] = None
import torch, visattn_fast as vf
x = torch.randn(2, 16, 5, 5, requires_grad=True)
for fast, plain in ((vf.FastSE(16), vf.reference.SE(16)), (vf.FastCBAM(16), vf.reference.CBAM(16))):
    plain.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(x, residual=x, activation="relu"), (plain(x) + x).relu())
    fast(x).sum().backward()
mean, w1, w2 = x.mean((2, 3)), torch.randn(4, 16), torch.randn(16, 4)
y, *_ = torch.ops.visattn_fast.se_fwd(x.detach(), w1, None, w2, None, None, 0, 1, 0)
torch.testing.assert_close(y, vf.reference.se(x.detach(), w1, None, w2, None))
found = vf.backends("cpu")
assert not found["cpp"].available and not found["triton"].available
print(found["cpp"].missing[0], "|", vf.backends("cuda")["triton"].missing[0])
"""
    cpp, triton = python(code, tmp_path).split(" | ")
    assert "not built" in cpp
    assert triton == "triton is not installed"


def test_first_call_by_many_threads_registers_once():
    """With slow stand-ins for all that is registered or loaded at the first call on a device."""
    code = """
import sys, threading, time, torch
import visattn_fast as vf
from visattn_fast import native
backends, calls = sys.modules["visattn_fast.backends"], []
def once(name):
    def register(argument=None, *rest):
        call = f"{name} {argument}" if isinstance(argument, str) else name
        calls.append(call)
        time.sleep(0.05)
        assert calls.count(call) == 1, "register an operator multiple times"
    return register
backends.register_triton, backends.register_cuda, native._load = map(once, ("triton", "cuda", "cpp"))
torch.version.cuda = "13.0"
backends._missing_for_triton = lambda device: ()
start = threading.Barrier(8)
failed = []
def call(device):
    start.wait()
    try:
        backends.select(device, torch.float32, "auto")
        vf.backends(device)
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=call, args=(d,)) for d in ("cuda", "cpu") * 4]
for t in threads: t.start()
for t in threads: t.join()
print(failed, sorted(calls))
"""
    assert python(code) == "[] ['cpp', 'cuda', 'triton CPU', 'triton CUDA']"


def test_first_call_by_many_threads_computes():
    """With the kernels themselves."""
    code = """
import threading, torch
import visattn_fast as vf
module, x = vf.FastCBAM(16), torch.randn(2, 16, 8, 8)
start, results = threading.Barrier(8), []
def call():
    start.wait()
    results.append(module(x))
threads = [threading.Thread(target=call) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(len(results), all(torch.equal(y, results[0]) for y in results))
"""
    assert python(code) == "8 True"
