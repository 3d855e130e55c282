"""S2-MLPv2's split attention by itself: where shifts take their values from, thin maps, threads, empty batches."""

from __future__ import annotations

import importlib

import pytest
import torch

import visattn_fast as vf
from cases import TARGETS, feature_map
from visattn_fast import catalogue
from visattn_fast.reference.split_attention import shifted_branches

layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)


def weights(channels, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    sizes = ((channels, channels), (3 * channels, channels))
    return [0.1 * torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def test_shifts():
    """Each quarter of the channels comes from above, below, left, right; in the second branch, axes are exchanged."""
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


@pytest.mark.parametrize(("device", "backend"), TARGETS)
@pytest.mark.parametrize("channels", [3, 4, 9, 32])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 2), (2, 3), (3, 2), (5, 4)])
@layouts
def test_thin_maps(layout, size, channels, device, backend):
    """Border values are used twice, once, or alone; opposite ones never."""
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


@pytest.mark.parametrize(("device", "backend"), TARGETS)
@layouts
def test_threads(layout, device, backend):
    """The same bits with any number of threads."""
    tensors = [feature_map((3, 30, 9, 11), layout, torch.float32, device), *weights(10, device=device)]
    tensors = [t.requires_grad_() for t in tensors]
    results, before = [], torch.get_num_threads()
    for threads in (before, 1, 3):
        torch.set_num_threads(threads)
        try:
            with vf.use_backend(backend):
                y = vf.functional.split_attention(*tensors)
                results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_empty_batch_launches_nothing(monkeypatch):
    pytest.importorskip("triton")
    kernels = importlib.import_module("visattn_fast.kernels.ops.split_attention")

    def no_launch(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(type(kernels._shift_sum_kernel), "__getitem__", no_launch)
    u, grad, gate, dtotal = (torch.ones(s) for s in ((0, 6, 3, 3), (0, 2, 3, 3), (0, 3, 2), (0, 2)))
    assert kernels.shift_total(u).shape == dtotal.shape
    assert kernels.shift_sum(u, gate).shape == grad.shape
    assert kernels.shift_dot(grad, u).shape == gate.shape
    assert kernels.shift_grad(grad, u, gate, dtotal).shape == u.shape
