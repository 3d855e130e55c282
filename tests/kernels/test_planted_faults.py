"""The tools that check kernels find faults: each kernel of `faults` fails one check, and no other."""

from __future__ import annotations

import re

import pytest
import torch

from cases import INTERPRETED

pytest.importorskip("triton")
tools = pytest.importorskip("tools.launches", reason="not beside the repository's tools")
compiled = pytest.importorskip("tools.compiled")
traffic = pytest.importorskip("tools.traffic")
import faults  # noqa: E402

interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter: needs TRITON_INTERPRET=1")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="compiles: needs TRITON_INTERPRET unset")


def account(launcher, shape, declared):
    x = torch.ones(shape, dtype=torch.bfloat16)
    counted = traffic.Traffic()
    with tools.watched("planted", counted, counted.operation):
        launcher(x)
    return traffic.Account("planted", declared, tuple(counted.moved), x)


@interpreted
def test_extra_pass():
    found = account(faults.three_passes, (1, 2, 20, 30), declared=3)
    assert found.fault.startswith(
        "planted moves 4.00 N, 3 N are declared: _three_passes_kernel (launch 1) reads x_ptr 3.00 N"
    )
    assert not account(faults.three_passes, (1, 2, 20, 30), declared=4).fault
    assert "tighten" in account(faults.three_passes, (1, 2, 20, 30), declared=5).verdict


@interpreted
def test_copy_by_the_launcher():
    found = account(faults.copied_first, (1, 2, 20, 30), declared=2)
    assert "planted moves 4.00 N" in found.fault
    assert "aten.clone.default (launch 1) reads input 0 1.00 N" in found.fault


def compile_faults(launcher, shape, target="sm_90"):
    uses = []
    with tools.watched("planted", lambda launch, run: uses.append(compiled.Use(launch, "planted", shape))):
        launcher(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    return [fault for c in compiled.compile_all(compiled.specialise(uses, [target])) for fault in c.faults]


@not_interpreted
@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize(
    ("launcher", "shape", "message"),
    [
        (faults.short_offset, (4, 1024, 1024, 1024), r"offset into x_ptr reaches 4,29\d,\d+,\d+: .*arith\.addi"),
        (faults.large_tile, (1, 1, 256, 512), r"spills \d{2,} bytes per thread"),
        (faults.lossy_max, (8, 8, 64, 64), r"loses NaN: arith\.maxnumf"),
        (faults.lossy_running_max, (8, 8, 64, 64), r"loses NaN: %best.* = arith\.select"),
        (faults.narrow_load, (8, 8, 64, 64), r"loads x_ptr 2 bytes at a time, 16 are aligned"),
        (faults.narrow_copy, (8, 16, 64, 64), r"loads x_ptr 4 bytes at a time, 16 are aligned"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_compiled(launcher, shape, message, target):
    found = [fault.partition(f"] for {target}: ") for fault in compile_faults(launcher, shape, target)]
    assert all(re.fullmatch(r"_\w+_kernel \[.*BLOCK=\d+", kernel) for kernel, _, _ in found), found
    assert any(re.search(message, fault) for _, _, fault in found), found
    kind = next(k for k in ("offset", "spills", "NaN", "at a time") if k in message)
    assert all(kind in fault for _, _, fault in found), found


@not_interpreted
@pytest.mark.parametrize("target", compiled.TARGETS)
def test_copies_to_shared_memory(target):
    """Copies into shared memory count as loads, and may take more of it than there is."""
    shape = (8, 16, 64, 64)
    assert not compile_faults(faults.product, shape, target)
    if compiled.TARGETS[target].backend == "cuda":  # AMD's compiler lets them wait in registers
        (fault,) = compile_faults(faults.large_buffers, shape, target)
        assert re.search(r"takes \d{6} bytes of shared memory, \d{6} are there", fault)
