"""Every kernel compiled ahead of time, as its launcher launches it; `make kernels` prints the table of all shapes.

A kernel's faults are spills, narrow accesses to large tensors, maxima that lose NaN, addresses that overflow 32 bits.
"""

from __future__ import annotations

import pytest
import torch
from test_flavours import BIASED
from test_gates import KINDS

from cases import INTERPRETED
from visattn_fast import catalogue

pytest.importorskip("triton")
compiled = pytest.importorskip("tools.compiled", reason="not beside the repository's tools")
Call = compiled.Call

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles: needs TRITON_INTERPRET unset")


def size(shape):
    return "x".join(map(str, shape))


def hold(shape, dtype, target):
    """Compiles what every module launches, and asserts that nothing is wrong with it."""
    kernels = compiled.compile_all(compiled.variants(compiled.calls([shape], [dtype]), [target]))
    assert len(kernels) > 20, "the launches were not seen"
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_every_target(target):
    hold(compiled.SHAPES[0], torch.bfloat16, target)


@pytest.mark.parametrize("shape", compiled.SHAPES[1:], ids=size)
def test_other_shapes(shape):
    hold(shape, torch.bfloat16, "sm_90")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype):
    hold(compiled.SHAPES[0], dtype, "sm_90")


def test_sizes_that_16_does_not_divide():
    """Triton knows of sizes only whether 16 divides them: accesses are as wide as 4 pixels, or 8 channels, allow."""
    names = ("se", "cbam", "coord_att")
    calls = [Call(catalogue.ENTRIES[name], (16, 120, 14, 14), layout) for name in names for layout in catalogue.LAYOUTS]
    kernels = compiled.compile_all(compiled.variants(calls, ["sm_90"]))
    assert len(kernels) > 20, "the launches were not seen"
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)


def test_maps_of_one_element():
    """Triton compiles sizes of 1 into the kernel, and folds a tile of one element into a number."""
    entries = [e for e in catalogue.ENTRIES.values() if e.takes((8, 1, 1, 1)) and not e.layers]
    kernels = compiled.compile_all(compiled.variants([Call(e, (8, 1, 1, 1)) for e in entries], ["sm_90"]))
    assert len(kernels) > 20, "the launches were not seen"
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)


def test_float64():
    """Compiles, and fits the chip; doubles take twice the registers, so some of it spills."""
    names = ("coord_att", "local_attention", "window_attention", "simam")  # products, staged maps, whole planes
    calls = [Call(catalogue.ENTRIES[name], (2, 64, 28, 28), dtype=torch.float64) for name in names]
    kernels = compiled.compile_all(compiled.variants(calls, ["sm_90"]))
    assert len(kernels) > 20, "the launches were not seen"
    faults = [fault for kernel in kernels for fault in kernel.faults if "spills" not in fault]
    assert not faults, "\n".join(faults)


def test_little_shared_memory():
    """The kernel that stages three maps fits cards with 99 KB."""
    calls = [Call(catalogue.ENTRIES["local_attention"], compiled.SHAPES[0], layout, residual=True, activation="relu")
             for layout in catalogue.LAYOUTS]  # fmt: skip
    found = [v for v in compiled.variants(calls, ["sm_89"]) if v.kernel == "_hidden_grads_kernel"]
    assert len(found) == 2, "the launches were not seen"
    faults = [fault for kernel in compiled.compile_all(found) for fault in kernel.faults]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("window", "head", "dtype", "target"),
    [
        (12, 32, torch.bfloat16, "sm_80"),
        (13, 64, torch.bfloat16, "sm_90"),  # many tokens are masked
        (12, 96, torch.bfloat16, "sm_90"),
        (8, 64, torch.float32, "gfx942"),
        (12, 96, torch.float32, "sm_80"),
    ],
    ids=str,
)
def test_windows(window, head, dtype, target):
    """Window attention where registers are scarcest: keys are met block by block, heads are wide, float32."""
    calls = compiled.window_calls([window], [head], [dtype])
    kernels = compiled.compile_all(compiled.variants(calls, [target]))
    names = {"forward", "queries", "table", "keys"}
    assert {kernel.variant.kernel for kernel in kernels} == {f"_{n}_kernel" for n in names}, (
        "the launches were not seen"
    )
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)


def test_shared_maxima():
    """The passes around a caller's gates, whose maxima share their gradient."""
    layouts = [Call(KINDS["even"], compiled.SHAPES[0], layout, residual=True) for layout in catalogue.LAYOUTS]
    kernels = compiled.compile_all(compiled.variants(layouts, ["sm_90"]))
    assert sum("pool" in kernel.variant.kernel for kernel in kernels) > 2, "the launches were not seen"
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)


def test_bias():
    """CBAM whose spatial gate has a bias."""
    variants = compiled.variants([Call(entry, compiled.SHAPES[0]) for entry in BIASED.values()], ["sm_90"])
    biased = [v for v in variants if {"b_ptr", "bias_parts_ptr"} & set(v.parameters) and "_conv" in v.kernel]
    assert {v.kernel for v in biased} == {"_conv_gate_kernel", "_conv_grads_kernel"}, "the launches were not seen"
    faults = [fault for kernel in compiled.compile_all(biased) for fault in kernel.faults]
    assert not faults, "\n".join(faults)


HUGE = [*((shape, "sm_90") for shape in compiled.HUGE), (compiled.HUGE[0], "gfx942")]


@pytest.mark.parametrize(("shape", "target"), HUGE, ids=lambda p: p if isinstance(p, str) else size(p))
def test_more_than_2_to_31_elements(shape, target):
    """No 32-bit integer behind an address can overflow, whatever program and loop step it is in."""
    hold(shape, torch.bfloat16, target)
