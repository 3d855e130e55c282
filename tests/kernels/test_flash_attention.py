"""The Triton kernels of attention over maps: many blocks, odd sizes, strides, and their machine code."""

from __future__ import annotations

import importlib

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED, TARGETS, poisoned
from visattn_fast import reference

pytest.importorskip("triton")
DEVICES = [device for device, backend in TARGETS if backend == "triton"]
NEEDS_DEVICE = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1")
on_devices = pytest.mark.parametrize("device", DEVICES or [pytest.param("none", marks=NEEDS_DEVICE)])
compiled_only = pytest.mark.skipif(INTERPRETED, reason="compiles: needs TRITON_INTERPRET unset")


def inputs(images, height, width, heads, d, device, bias=True, masked=True):
    generator = torch.Generator().manual_seed(0)
    qkv, table = (
        torch.randn(s, generator=generator).to(device)
        for s in ((images, height, width, 3, heads, d), (2 * height - 1, 2 * width - 1, heads))
    )
    mask = (torch.rand(images, height, width, generator=generator) < 0.7).to(device)
    return qkv, table if bias else None, mask if masked else None


def gradients(function, qkv, table, mask):
    """Returns the result, the mean weights, and the gradients."""
    leaves = [t.detach().requires_grad_() for t in (qkv, table) if t is not None]
    out, mean = function(*leaves, *[None] * (table is None), mask, need_weights="mean")
    return out, mean, *torch.autograd.grad(out, leaves, out.detach().cos())


def check(qkv, table, mask):
    with vf.use_backend("triton"), poisoned():
        found = gradients(vf.functional.attention2d, qkv, table, mask)
    for got, want in zip(found, gradients(reference.attention2d, qkv, table, mask), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return found


@on_devices
@pytest.mark.parametrize(
    ("size", "d", "bias", "masked"),
    [
        ((9, 15), 24, False, True),  # three blocks of queries and of keys, the last one short
        ((2, 37), 48, True, False),  # a table of four tiles, heads that are no power of two
        ((1, 1), 96, True, True),
        ((9, 1), 1, True, False),
    ],
)
def test_sizes(size, d, bias, masked, device):
    check(*inputs(1, *size, 1, d, device, bias, masked))


@on_devices
def test_split_images(device, monkeypatch):
    """Programs that share the sum over images leave partials, summed up in a fixed order."""
    kernels = importlib.import_module("visattn_fast.kernels.attention.flash_bwd")
    whole = check(*inputs(5, 2, 3, 1, 4, device))
    monkeypatch.setattr(kernels, "split", lambda programs, images: (3, 2))
    torch.testing.assert_close(check(*inputs(5, 2, 3, 1, 4, device)), whole)


@on_devices
def test_strides(device):
    """Views of wider tensors are read in place, those that are not evenly spaced are copied; results are the same."""
    qkv, table, mask = inputs(2, 3, 4, 2, 8, device)
    wide = torch.cat([qkv, qkv], 5)[..., :8]
    views = [wide, qkv.transpose(1, 2).contiguous().transpose(1, 2), qkv[:1].expand_as(qkv), qkv[:, :, 1:]]
    prepare = importlib.import_module("visattn_fast.kernels.attention.flash").prepare
    assert [prepare(v, None, 1.0).qkv.data_ptr() == v.data_ptr() for v in views] == [True, False, True, False]
    for view in views:
        check(view, table, mask[:, :, : view.shape[2]])
    assert prepare(views[1][:0], None, 1.0).size.stride_l == 3 * 2 * 8, "copied for ever"


@on_devices
def test_too_wide(device):
    with vf.use_backend("triton"), pytest.raises(ValueError, match="heads of up to 128, got 129"):
        vf.functional.attention2d(torch.zeros(1, 1, 1, 3, 1, 129, device=device))


def test_empty_batch_launches_nothing(monkeypatch):
    launchers = importlib.import_module("visattn_fast.kernels.ops.self_attention")
    kernels = importlib.import_module("visattn_fast.kernels.attention.flash_fwd")

    def no_launch(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(type(kernels._attention_kernel), "__getitem__", no_launch)
    qkv, table, mask = inputs(0, 3, 4, 2, 8, "cpu")
    out, lse = launchers.attention_fwd(qkv, table, mask, 1.0)
    dqkv, dtable = launchers.attention_bwd(out, qkv, table, mask, out, lse, 1.0)
    assert out.shape == (0, 3, 4, 2, 8)
    assert dqkv.shape == qkv.shape
    assert not dtable.any()
    assert launchers.attention_mean(qkv, table, mask, lse, 1.0).shape == (0, 2, 3, 4)


def uses(compiled, d, dtype, bias, size=(32, 32), images=2):
    """Returns every launch of forward, backward and mean weights, with a bias and a mask or without."""
    launches = importlib.import_module("tools.launches")
    found = []
    height, width = size
    qkv, table, mask = (
        torch.empty(s, dtype=t, device="meta")
        for s, t in (
            ((images, *size, 3, 4, d), dtype),
            ((2 * height - 1, 2 * width - 1, 4), torch.float32),
            ((images, *size), torch.bool),
        )
    )
    qkv.requires_grad_()
    with launches.routed("attention", lambda launch, run: found.append(launch)):
        out, _ = vf.functional.attention2d(qkv, table if bias else None, mask if bias else None, need_weights="mean")
        out.backward(torch.empty_like(out))
    return [compiled.Use(launch, f"attention over {size}", ()) for launch in found]


@compiled_only
@pytest.mark.parametrize(
    ("d", "dtype", "target"),
    [
        (32, torch.float32, "sm_90"),
        (96, torch.float32, "sm_80"),
        (64, torch.float16, "sm_80"),
        (64, torch.bfloat16, "sm_100"),
        (128, torch.float16, "gfx942"),
    ],
    ids=str,
)
def test_compiled(d, dtype, target, monkeypatch):
    """There are no spills, 32-bit overflows or lost NaN; heads are read 16 bytes at a time, wide ones in float32 8."""
    compiled = pytest.importorskip("tools.compiled", reason="not beside the repository's tools")
    monkeypatch.setattr("visattn_fast.kernels.core.heuristics.amd", lambda: target == "gfx942")
    kernels = compiled.compile_all(compiled.specialise(uses(compiled, d, dtype, True), [target]))
    names = {k.variant.kernel for k in kernels}
    assert names == {f"_{n}_kernel" for n in ("attention", "mean_weights", "delta", "dkdv", "dq", "dtable")}
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)
    for kernel in kernels:
        wide = {"qkv_ptr", "grad_ptr", "out_ptr", "dqkv_ptr"} & set(kernel.variant.parameters)
        for name in wide:
            position = kernel.variant.parameters.index(name)
            widths = {(a.kind, a.width) for a in kernel.accesses if position in a.arguments}
            store = 8 if target == "gfx942" else 16  # the layout in which products leave a tile there
            load = 8 if dtype == torch.float32 and d > 64 else 16  # tiles of a few channels
            assert widths
            assert all(width >= (load if kind == "load" else store) for kind, width in widths), (name, widths)


@compiled_only
@pytest.mark.parametrize(("size", "images"), [((32, 32), 4096), ((2048, 2048), 1)], ids=str)
def test_more_than_2_to_31_elements(size, images):
    """No 32-bit integer behind an address overflows, in many images or in one."""
    compiled = pytest.importorskip("tools.compiled", reason="not beside the repository's tools")
    kernels = compiled.compile_all(
        compiled.specialise(uses(compiled, 64, torch.float16, True, size, images), ["sm_90"])
    )
    faults = [fault for kernel in kernels for fault in kernel.faults]
    assert not faults, "\n".join(faults)
