"""The number of launches of a call, which small maps wait for; and the results and dtypes of merged launches."""

from __future__ import annotations

import importlib

import pytest
import torch

from cases import INTERPRETED, TARGETS, RecordedOps, check, feature_map
from visattn_fast import catalogue
from visattn_fast.ops.library import OPS

pytest.importorskip("triton")
counted = pytest.importorskip("tools.launches", reason="not beside the repository's tools")
mlp, channel_conv = (importlib.import_module(f"visattn_fast.kernels.passes.{name}") for name in ("mlp", "channel_conv"))

WITH_KERNELS = [e for e in catalogue.ENTRIES.values() if e.forward_passes]
MERGED = (
    "se",
    "eca",
    "cbam",
    "scse",
    "channel_attention",
    "spatial_attention",
    "nam",
    "local_attention",
    "shuffle_attention",
)
DEVICES = [device for device, backend in TARGETS if backend == "triton"]
NEEDS_DEVICE = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1")
on_devices = pytest.mark.parametrize("device", DEVICES or [pytest.param("none", marks=NEEDS_DEVICE)])
formats = pytest.mark.parametrize("layout", catalogue.LAYOUTS)

# Launches of a training step in bfloat16, forward and backward, with PyTorch's own. If there are two figures, some
# shapes need one more launch that combines partial results, or layouts differ.
LAUNCHES = {
    "se": (3, 3),
    "eca": (3, 3),
    "cbam": ((5, 6), 6),
    "scse": (4, (3, 4)),
    "channel_attention": (2, 2),
    "spatial_attention": ((2, 3), 3),
    "shuffle_attention": ((1, 3), (2, 4)),
    "simam": ((1, 3), (1, 3)),
    "local_attention": (3, 5),
    "nam": (8, 4),
    "gam": ((19, 20), (24, 25)),
    "soca": ((264, 282), (555, 620)),
    "coord_att": ((10, 11), (9, 10)),
    "triplet_attention": (37, 25),
    "window_attention": ((6, 8), (13, 15)),
}


@formats
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (32, 512, 28, 28)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name, shape, layout):
    """There are as many as in the table; if there are fewer, tighten the table."""
    found = counted.launches(counted.Call(catalogue.ENTRIES[name], shape, layout))
    for (op, launches), allowed in zip(found.items(), LAUNCHES[name], strict=True):
        allowed = (allowed,) if isinstance(allowed, int) else allowed
        assert allowed[0] <= launches.total() <= allowed[-1], f"{op}: {dict(launches)}"


@pytest.mark.parametrize(("name", "kernel"), [("se", "_dx_mlp_kernel"), ("eca", "_dx_kernel")])
def test_input_gradient_compiles_an_mlp_only_if_there_is_one(name, kernel):
    found = counted.launches(counted.Call(catalogue.ENTRIES[name], (2, 64, 7, 7)))[f"{name}_bwd"]
    assert [name for name in found if "_dx_" in name] == [kernel]


def test_copies_are_seen():
    """A view counts if it had to be copied, and only then."""
    x = torch.empty(4, 6, device="meta")
    for copied, made in ((False, x.reshape(24)), (True, x.t().reshape(24)), (False, x.contiguous())):
        assert counted.launches_something(torch.ops.aten.reshape.default, (x,), made) == copied
    assert not counted.launches_something(torch.ops.aten.empty.memory_format, (), x)
    assert counted.launches_something(torch.ops.aten._local_scalar_dense.default, (x,), 1.0)


@formats
@pytest.mark.parametrize("entry", [e for e in WITH_KERNELS if not e.has_torch_layers], ids=lambda e: e.name)
def test_peak_of_live_tensors(entry, layout):
    """Only x, y, its gradient, dx and small tensors are alive at once: there is no copy of a map beside them."""
    shape = (8, 64, 112, 112)
    x_bytes = 2 * torch.Size(shape).numel()
    peak, y_bytes = counted.peak_bytes(counted.Call(entry, shape, layout))
    small = 0.16 + 3 * entry.saved  # small tensors are float32, and some have gradients
    assert 2 * x_bytes <= peak <= (2 + small) * x_bytes + 2 * y_bytes


def test_a_copy_would_show(monkeypatch):
    se = importlib.import_module("visattn_fast.kernels.ops.se")
    input_grad = se.input_grad

    def with_a_copy(x, *args, **kwargs):
        copy = x.clone()
        return input_grad(copy, *args, **kwargs)

    monkeypatch.setattr(se, "input_grad", with_a_copy)
    x_bytes = 2 * 8 * 64 * 112 * 112
    assert counted.peak_bytes(counted.Call(catalogue.ENTRIES["se"], (8, 64, 112, 112)))[0] > 5 * x_bytes


@pytest.mark.skipif(INTERPRETED, reason="asks every other implementation")
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", MERGED)
def test_gradients_have_their_weights_dtypes(name, dtypes):
    """The CPU's kernels, PyTorch and the fakes return the weights' dtypes; Triton's gradients are tested below."""
    entry = catalogue.ENTRIES[name]
    fast = entry.pair(16, dtypes[1])[0]
    x = feature_map((2, 16, 5, 6), "nchw", dtypes[0]).requires_grad_()
    with RecordedOps() as recorder:
        fast(x).sum().backward()
    op, arguments = recorder.calls[-1]
    on_paper = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    count = len(OPS[op._opname].gradients_of)
    assert count
    for results in (op(*arguments), OPS[op._opname].reference(*arguments), op(*on_paper)):
        assert {d.dtype for d in results[-count:]} == {dtypes[1]}
        assert results[0].dtype == dtypes[0]


@on_devices
@pytest.mark.parametrize("name", MERGED)
def test_triton_rounds_once(name, device):
    """Gradients in the weights' dtype are the rounded gradients of float32."""
    entry = catalogue.ENTRIES[name]
    fast = entry.pair(16)[0].to(device)
    x = feature_map((2, 16, 5, 6), "nchw", torch.float32, device).requires_grad_()
    backends = importlib.import_module("visattn_fast.backends")
    with backends.use_backend("triton"), RecordedOps() as recorder:
        fast(x).sum().backward()
    op, arguments = recorder.calls[-1]
    launcher = getattr(importlib.import_module(f"visattn_fast.kernels.ops.{OPS[op._opname].launcher}"), op._opname)
    weights = set(OPS[op._opname].gradients_of)
    rounded = [a.bfloat16() if i in weights else a for i, a in enumerate(arguments)]
    exact = [a.float() if i in weights else a for i, a in enumerate(rounded)]
    count = len(OPS[op._opname].gradients_of)
    for got, want in zip(launcher(*rounded)[-count:], launcher(*exact)[-count:], strict=True):
        assert got.dtype == torch.bfloat16
        if device == "cpu":  # the interpreter cuts off what a GPU rounds
            torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)
        else:
            assert torch.equal(got, want.bfloat16())


@on_devices
@formats
@pytest.mark.parametrize("name", ["se", "cbam", "scse"])
@pytest.mark.parametrize("limit", ["FUSED", "FUSED_PARTIALS"])
def test_layers_of_many_weights(name, limit, layout, device, monkeypatch):
    """Each layer is a launch of its own if one program would have too many weights or partial sums."""
    monkeypatch.setattr(mlp, limit, 1)
    check(catalogue.ENTRIES[name], feature_map((2, 40, 16, 20), layout, torch.float32, device), "triton")


@on_devices
@formats
def test_many_partials(layout, device, monkeypatch):
    monkeypatch.setattr(channel_conv, "MOST_PARTIALS", 1)
    check(catalogue.ENTRIES["eca"], feature_map((2, 40, 16, 20), layout, torch.float32, device), "triton")
