"""Triton's long sums: no lane adds up more than some tens of values in sequence, so equal values do not drift."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from cases import TARGETS, feature_map
from visattn_fast import catalogue

pytest.importorskip("triton")
heuristics, layouts = (importlib.import_module(f"visattn_fast.kernels.core.{n}") for n in ("heuristics", "layout"))
partials, weight_grads, axis, axis_tiles, cube = (
    importlib.import_module(f"visattn_fast.kernels.passes.{name}")
    for name in ("partials", "weight_grads", "lines.axis", "lines.axis_tiles", "faces.cube")
)
launch = importlib.import_module("visattn_fast.kernels.core.launch").launch

DEVICES = [device for device, backend in TARGETS if backend == "triton"]
NEEDS_DEVICE = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1")
on_devices = pytest.mark.parametrize("device", DEVICES or [pytest.param("none", marks=NEEDS_DEVICE)])
formats = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
EPS = torch.finfo(torch.float32).eps
MANY = 1 << 17  # partials
# The first is large enough for all programs, so that each would add up all of a channel.
SHAPES = ((128, 64, 512, 512), (1, 1, 8192, 8192), (2048, 64, 112, 112), (1, 2048, 512, 512))


def layout_of(shape: tuple[int, ...], layout: str) -> Any:
    return layouts.canonical(torch.empty(shape, device="meta", memory_format=catalogue.LAYOUTS[layout]))[1]


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_no_program_adds_up_a_long_sum_alone(shape, layout):
    where = layout_of(shape, layout)
    grids = [
        heuristics.reduction(where, over_c=False),
        heuristics.reduction(where, over_c=True),
        axis_tiles.axis_grid(where, 4),
        cube.cube_grid(where, 4, spatial=True),
    ]
    for grid in grids:
        assert grid.splits <= heuristics.PROGRAMS
        assert grid.steps <= heuristics.MAX_STEPS or grid.splits > heuristics.PROGRAMS // 2


@formats
def test_usual_maps_have_the_splits_that_fill_a_chip(layout):
    where = layout_of((64, 256, 56, 56), layout)
    found = heuristics.reduction(where, over_c=False)
    tiles = -(-where.HW // found.tile.BLOCK_P)
    assert (found.splits, found.steps) == heuristics.split(where.N * found.blocks, tiles)


def one_tenth(device: str, *sizes: int) -> torch.Tensor:
    return torch.full(sizes, 0.1, device=device)


def error(found: torch.Tensor, exact: float) -> float:
    return float((found.double() / exact - 1).abs().max())


@on_devices
def test_equal_partials_do_not_drift(device):
    exact = float(one_tenth(device, 1).double()) * MANY
    summed = partials.combine(one_tenth(device, 1, MANY, 64), None, one_tenth(device, 1, 64))
    assert error(summed, exact) <= 20 * EPS


@on_devices
@formats
def test_lines_of_equal_values_do_not_drift(device, layout):
    x = one_tenth(device, 1, 2, 1, 40_000).contiguous(memory_format=catalogue.LAYOUTS[layout])
    for long in (x, x.mT.contiguous(memory_format=catalogue.LAYOUTS[layout])):
        means = importlib.import_module("visattn_fast.kernels.ops.axis").axis_mean(long)
        assert error(means, float(x.flatten()[0].double())) <= 20 * EPS


@on_devices
@pytest.mark.parametrize("rows", [1, 63, 5000])
def test_chains_add_up_all_rows(device, rows):
    """Sums of rows and of pairs of rows, with one chain and with several."""
    values = feature_map((1, rows, 2, 24), "nchw", torch.float32, device)[0]
    expected = values.double().sum(0)

    found = partials.combine(values.reshape(1, rows, 48), None, values.new_empty(1, 48))
    torch.testing.assert_close(found.view(2, 24).double(), expected, rtol=1e-5, atol=1e-4)

    gate = importlib.import_module("visattn_fast.kernels.passes.batch_norm_gate")
    sums, dweight, dbias = values.new_empty(2, 24), values.new_empty(24), values.new_empty(24)
    launch(
        gate._combine_grads_kernel, 1, values, torch.ones_like(dbias), None, sums, dweight, dbias, 24, rows,
        BLOCK_S=16, BLOCK_L=32,
    )  # fmt: skip
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)
