"""Triton launchers: launch parameters, layouts, reductions that several programs share, empty batches.

Kernels run on a GPU, or on the CPU under TRITON_INTERPRET=1; code that only plans a launch is tested everywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from cases import INTERPRETED, TARGETS, check, feature_map
from visattn_fast import catalogue
from visattn_fast.reference.activations import Activation, GateActivation

pytest.importorskip("triton")
cbam, channel_scale, eca, local_attention, nam, norm_gate, scse, se, shuffle_attention, simam = (
    importlib.import_module(f"visattn_fast.kernels.ops.{name}")
    for name in (
        *("cbam", "channel_scale", "eca", "local_attention", "nam", "norm_gate", "scse", "se", "shuffle_attention"),
        "simam",
    )
)
activations, heuristics, layouts = (
    importlib.import_module(f"visattn_fast.kernels.core.{name}") for name in ("activations", "heuristics", "layout")
)

DEVICES = [device for device, backend in TARGETS if backend == "triton"]
LONG = ((1, 5, 53, 47), (1, 1030, 3, 2))  # several programs along the pixels, along the channels
NEEDS_DEVICE = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1")
on_devices = pytest.mark.parametrize("device", DEVICES or [pytest.param("none", marks=NEEDS_DEVICE)])
entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)
formats = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
shapes = pytest.mark.parametrize("shape", LONG, ids=lambda s: "x".join(map(str, s)))


def layout_of(shape: tuple[int, ...], layout: str) -> Any:
    return layouts.canonical(torch.empty(shape, device="meta", memory_format=catalogue.LAYOUTS[layout]))[1]


def test_activation_codes_are_those_of_the_ops():
    assert {code.name: getattr(activations, code.name).value for code in Activation} == dict(Activation.__members__)
    for code, gate in zip(GateActivation, activations.GATE_ACTIVATIONS, strict=True):
        assert gate == getattr(activations, code.name).value


@formats
@pytest.mark.parametrize("over_c", [False, True])
def test_reduction_covers(layout, over_c):
    splits = []
    for shape in (*LONG, (0, 3, 4, 4), (1, 1, 1, 1), (64, 256, 56, 56), (1, 128, 1024, 1024), (3, 70000, 1, 1)):
        where = layout_of(shape, layout)
        r = heuristics.reduction(where, over_c)
        kept, reduced = (where.HW, where.C) if over_c else (where.C, where.HW)
        block_kept, block_reduced = (r.tile.BLOCK_P, r.tile.BLOCK_C)[:: 1 if over_c else -1]
        assert (r.blocks - 1) * block_kept < kept <= r.blocks * block_kept
        assert (r.splits - 1) * r.steps * block_reduced < reduced <= r.splits * r.steps * block_reduced
        assert r.splits <= 65535  # the second axis of a grid
        splits.append(r.splits)
    assert max(splits[: len(LONG)]) > 1, "several programs are to share the reductions of the shapes below"


@formats
def test_slices_are_read_in_place(layout):
    x = torch.randn(4, 9, 6, 10).contiguous(memory_format=catalogue.LAYOUTS[layout])
    inner_axis_cut = {"nchw": x[..., 1:], "channels_last": x[:, :, ::2, 1:]}[layout]
    for view, copied in ((x[::2], False), (x[:, 2:5], False), (x[:1].expand_as(x), False), (inner_axis_cut, True)):
        read, where = layouts.canonical(view)
        assert (read.data_ptr() != view.data_ptr()) == copied
        assert where.is_dense(where.empty(view))


@on_devices
@entries
@formats
@shapes
def test_split_reductions(entry, layout, shape, device):
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    arguments = entry.arguments(shape[1])
    if "reduction" in arguments and shape[1] > 1000:  # few hidden channels: the reductions of x are to be split
        arguments["reduction"] = shape[1] // 10
        entry = dataclasses.replace(entry, arguments=lambda c: arguments)
    check(entry, feature_map(shape, layout, torch.float32, device), "triton")


@on_devices
@formats
@pytest.mark.parametrize(("channels", "reduction"), [(300, 1), (40, 1), (264, 4)])
def test_many_hidden_units(channels, reduction, layout, device):
    """There may be more hidden units than a product takes, than signs share an integer, than a program can sum up."""
    arguments = {"channels": channels, "reduction": reduction}
    entry = dataclasses.replace(catalogue.ENTRIES["local_attention"], arguments=lambda c: arguments)
    check(entry, feature_map((2, channels, 5, 4), layout, torch.float32, device), "triton")


@on_devices
@formats
@shapes
@pytest.mark.parametrize("value", [0.0, torch.nan, -torch.inf])
def test_first_maximum_of_all_splits(layout, shape, value, device):
    """The first one of equal maxima in all splits wins; the first NaN wins over all of them."""
    x = feature_map(shape, layout, torch.float32, device).clamp_(max=0)
    if value:
        x[:, -2:, -1, -2:] = value
    if value == -torch.inf:
        x.fill_(value)
    C = shape[1]
    ones = [torch.ones(s, device=device) for s in ((2, C), (C, 2), (1, 2, 3, 3))]
    _, pooled, argmax_hw, _ = cbam.channel_attention_fwd(x, *ones[:2])
    _, maps, argmax_c = cbam.spatial_attention_fwd(x, ones[2], None)
    for got, index, exact in ((pooled[:, 1], argmax_hw, x.flatten(2).max(2)), (maps[:, 1], argmax_c, x.max(1))):
        torch.testing.assert_close(got, exact.values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index.long(), exact.indices)


def test_empty_batch_launches_nothing(monkeypatch):
    def no_launch(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("launched")

    runner = type(importlib.import_module("visattn_fast.kernels.passes.pool")._pool_kernel)
    monkeypatch.setattr(runner, "run", no_launch, raising=False)
    monkeypatch.setattr(runner, "__getitem__", no_launch)
    x, w1, w2, wconv, weight = (torch.ones(s) for s in ((0, 6, 3, 3), (2, 6), (6, 2), (1, 2, 3, 3), (1, 1, 3)))
    y, *small = se.se_fwd(x, w1, None, w2, None, None, 1, 1, 0)
    gradients = se.se_bwd(y, x, w1, w2, None, *small, 1, 1, 0)
    y, *small = eca.eca_fwd(x, weight, x, 0)
    gradients += eca.eca_bwd(y, x, weight, x, *small, 0)
    pixel = torch.ones(1, 6)
    y, *small = scse.scse_fwd(x, w1, None, w2, None, pixel, None, x, 1)
    gradients += scse.scse_bwd(y, x, w1, w2, pixel, x, *small, 1)
    p2, offset = torch.ones(1, 2), torch.ones(1)
    y, *small = local_attention.local_attention_fwd(x, w1, None, w2, None, w1, None, p2, offset, x, 1)
    gradients += local_attention.local_attention_bwd(y, x, w1, w2, w1, None, p2, x, *small, 1)
    y, *small = cbam.cbam_fwd(x, w1, w2, wconv, offset, x, 2)
    gradients += cbam.cbam_bwd(y, x, w1, w2, wconv, offset, x, *small, 2)
    gate = torch.ones(0, 6)
    gradients += (channel_scale.channel_scale_fwd(x, gate, x, 1), *channel_scale.channel_scale_bwd(y, x, gate, x, 1))
    gradients += (channel_scale.channel_input_grad(y, x, gate, gate),)
    gate, *small = cbam.channel_attention_fwd(x, w1, w2)
    gradients += cbam.channel_attention_bwd(gate, x, w1, w2, gate, *small)
    gate, *small = cbam.spatial_attention_fwd(x, wconv, offset)
    gradients += cbam.spatial_attention_bwd(gate, x, wconv, offset, gate, *small)
    y, *small = simam.simam_fwd(x, x, 1, 1e-4)
    gradients += simam.simam_bwd(y, x, x, *small, 1)
    six = [torch.ones(3)] * 6
    y, *small = shuffle_attention.shuffle_attention_fwd(x, *six, x, 1, 1e-5)
    gradients += shuffle_attention.shuffle_attention_bwd(y, x, *six, x, *small, 1)
    c = torch.ones(6)
    y, *small = nam.nam_fwd(x, c, c, None, None, x, 1, 1e-5)
    gradients += nam.nam_bwd(y, x, c, c, x, *small, 1, 1e-5, False)
    y, *small = norm_gate.norm_gate_fwd(x, x, c, c, None, None, x, 1, 1e-5)
    gradients += norm_gate.norm_gate_bwd(y, x, x, c, c, x, *small, 1, 1e-5, False)
    assert all(not g.any() for g in gradients)


@pytest.mark.skipif(not INTERPRETED, reason="runs what a GPU times")
def test_timed_passes():
    """Each pass with a grain runs, at this grain and at another."""
    times = pytest.importorskip("tools.gpu_times", reason="not beside the repository's tools")
    for layout in catalogue.LAYOUTS:
        found = times.passes((1, 8, 6, 5), layout, "cpu", torch.float32)
        assert found.keys() == times.heuristics.GRAINS.keys()
        for name, run in found.items():
            with times.chosen(name, times.heuristics.Grain(1024, 64, 8)):
                run()
            run()
