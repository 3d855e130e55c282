"""Every kernel compiles ahead of time, as its launcher launches it, without faults; `make kernels` prints all shapes.

A kernel's faults are spills, narrow accesses to large tensors, maxima that lose NaN, addresses that overflow 32 bits.
"""

from __future__ import annotations

import pytest
import torch

from cases import INTERPRETED
from variants import BIASED, CUSTOM
from visattn_fast import catalogue

pytest.importorskip("triton")
compiled = pytest.importorskip("tools.compiled", reason="not beside the repository's tools")
Call = compiled.Call

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles: needs TRITON_INTERPRET unset")


def size(shape):
    return "x".join(map(str, shape))


def hold(calls, target, chosen=lambda variant: True, allowed=None):
    """Compiles the chosen launches of the calls, asserts that there are no faults, and returns the kernels' names."""
    kernels = compiled.compile_all(v for v in compiled.variants(calls, [target]) if chosen(v))
    faults = [fault for kernel in kernels for fault in kernel.faults if not (allowed and allowed in fault)]
    assert not faults, "\n".join(faults)
    return [kernel.variant.kernel for kernel in kernels]


def hold_all(calls, target, **options):
    """Asserts the same, and that the calls launch many kernels."""
    assert len(hold(calls, target, **options)) > 20, "the launches were not seen"


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_every_target(target):
    hold_all(compiled.calls([compiled.SHAPES[0]], [torch.bfloat16]), target)


@pytest.mark.parametrize("shape", compiled.SHAPES[1:], ids=size)
def test_other_shapes(shape):
    hold_all(compiled.calls([shape], [torch.bfloat16]), "sm_90")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype):
    hold_all(compiled.calls([compiled.SHAPES[0]], [dtype]), "sm_90")


def test_sizes_that_16_does_not_divide():
    """Accesses are as wide as 4 pixels, or 8 channels, allow, though Triton only knows whether 16 divides a size."""
    names = ("se", "cbam", "coord_att")
    calls = [Call(catalogue.ENTRIES[name], (16, 120, 14, 14), layout) for name in names for layout in catalogue.LAYOUTS]
    hold_all(calls, "sm_90")


def test_maps_of_one_element():
    """Sizes of 1, which Triton compiles into the kernel, and tiles of one element, which it makes a number, compile."""
    entries = [e for e in catalogue.ENTRIES.values() if e.supports((8, 1, 1, 1)) and not e.has_torch_layers]
    hold_all([Call(e, (8, 1, 1, 1)) for e in entries], "sm_90")


def test_float64():
    """Doubles compile and fit the chip; they take twice the registers, so some kernels spill."""
    names = ("coord_att", "local_attention", "window_attention", "simam")  # products, staged maps, whole planes
    calls = [Call(catalogue.ENTRIES[name], (2, 64, 28, 28), dtype=torch.float64) for name in names]
    hold_all(calls, "sm_90", allowed="spills")


def test_little_shared_memory():
    """The kernel that stages three maps fits cards with 99 KB."""
    entry = catalogue.ENTRIES["local_attention"]
    calls = [Call(entry, compiled.SHAPES[0], layout, residual=True, activation="relu") for layout in catalogue.LAYOUTS]
    found = hold(calls, "sm_89", lambda v: v.kernel == "_pixel_mlp_grads_kernel")
    assert len(found) == 2, "the launches were not seen"


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
    """Window attention compiles where registers are scarcest: keys met block by block, wide heads, float32."""
    names = hold(compiled.window_calls([window], [head], [dtype]), target)
    assert set(names) == {f"_window_{n}_kernel" for n in ("forward", "queries", "table", "keys", "totals")}


def test_shared_maxima():
    """The passes around a caller's gates, whose equal maxima share their gradient, compile."""
    layouts = [Call(CUSTOM["even"], compiled.SHAPES[0], layout, residual=True) for layout in catalogue.LAYOUTS]
    assert sum("pool" in name for name in hold(layouts, "sm_90")) > 2, "the launches were not seen"


def test_bias():
    """CBAM whose spatial gate has a bias compiles."""
    calls = [Call(entry, compiled.SHAPES[0]) for entry in BIASED.values()]
    names = hold(calls, "sm_90", lambda v: {"b_ptr", "bias_partials_ptr"} & set(v.parameters) and "_conv" in v.kernel)
    assert set(names) == {"_conv_gate_kernel", "_conv_grads_kernel"}, "the launches were not seen"


HUGE = [*((shape, "sm_90") for shape in compiled.HUGE), (compiled.HUGE[0], "gfx942")]


@pytest.mark.parametrize(("shape", "target"), HUGE, ids=lambda p: p if isinstance(p, str) else size(p))
def test_more_than_2_to_31_elements(shape, target):
    """No 32-bit integer behind an address can overflow, in any program and loop step."""
    hold_all(compiled.calls([shape], [torch.bfloat16]), target)
