"""S2-MLPv2's split attention: the sources of its shifts, thin maps, empty batches."""

from __future__ import annotations

import importlib

import pytest
import torch

import visattn_fast as vf
from cases import feature_map, layouts, targets
from visattn_fast import catalogue
from visattn_fast.reference.split_attention import shifted_branches


def weights(channels, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    sizes = ((channels, channels), (3 * channels, channels))
    return [0.1 * torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def test_shifted_branches_take_the_right_neighbours():
    """The quarters of the channels come from above, below, left and right; the second branch exchanges the axes."""
    c, h, w = 9, 4, 5
    u = torch.arange(3.0 * c * h * w).view(1, 3 * c, h, w)
    steps = ((-1, 0), (1, 0), (0, -1), (0, 1))
    for k, branch in enumerate(shifted_branches(u)):
        for channel in range(c):
            quarter = min(channel // (c // 4), 3)
            dh, dw = steps[(quarter + 2 * k) % 4] if k < 2 else (0, 0)
            for i in range(h):
                for j in range(w):
                    source = min(max(i + dh, 0), h - 1), min(max(j + dw, 0), w - 1)
                    assert branch[0, channel, i, j] == u[0, k * c + channel, source[0], source[1]]


@targets
@pytest.mark.parametrize("channels", [3, 4, 9, 32])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (3, 2), (5, 4)])
@layouts
def test_thin_maps_match_reference(layout, size, channels, device, backend):
    """A border value is used twice, once or alone; the value of the opposite border never."""
    u = feature_map((2, 3 * channels, *size), layout, torch.float64, device).requires_grad_()
    grad = feature_map((2, channels, *size), layout, torch.float64, device, seed=1)
    tensors = [u, *(w.requires_grad_() for w in weights(channels, torch.float64, device))]
    results = []
    for name in (backend, "reference"):
        with vf.use_backend(name):
            y = vf.functional.split_attention(*tensors)
        results.append((y, *torch.autograd.grad(y, tensors, grad)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert results[0][0].is_contiguous(memory_format=catalogue.LAYOUTS[layout])


def test_empty_batch_launches_nothing(monkeypatch):
    pytest.importorskip("triton")
    launchers = importlib.import_module("visattn_fast.kernels.ops.split_attention")
    kernels = importlib.import_module("visattn_fast.kernels.passes.shifted_branches")

    def no_launch(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(type(kernels._shift_sum_kernel), "__getitem__", no_launch)
    u, grad, gate, dtotal = (torch.ones(s) for s in ((0, 6, 3, 3), (0, 2, 3, 3), (0, 3, 2), (0, 2)))
    assert launchers.shift_total(u).shape == dtotal.shape
    assert launchers.shift_sum(u, gate).shape == grad.shape
    assert launchers.shift_dot(grad, u).shape == gate.shape
    assert launchers.shift_grad(grad, u, gate, dtotal).shape == u.shape
