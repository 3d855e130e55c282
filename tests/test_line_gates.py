"""The gates of rows and columns beyond what coordinate attention's own tests have: many hidden channels, no affine."""

from __future__ import annotations

import importlib

import pytest
import torch
from test_launches import on_devices

from visattn_fast.ops import line_gates as ops

pytest.importorskip("triton")
kernels = importlib.import_module("visattn_fast.kernels.line_gates")

N, C, H, W = 3, 40, 17, 3
HIDDEN = 36  # as C: two blocks, of which one is not full


def arguments(device, channels_inside=False, affine=True, fixed=False, hidden=HIDDEN):
    """Of the forward op, float32; and a gradient of its gates."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    means, grad = random(N, C, H + W), random(N, C, H + W)
    if channels_inside:
        means, grad = (t.mT.contiguous().mT for t in (means, grad))
    vectors = [random(hidden) if affine else None for _ in range(3)]
    statistics = (random(hidden), random(hidden).exp()) if fixed else (None, None)
    b_h, b_w = (random(C) if affine else None for _ in range(2))
    weights = (random(hidden, C, 1, 1) / 6, *vectors, *statistics, random(C, hidden, 1, 1) / 6, b_h)
    found = (means, H, *weights, random(C, hidden, 1, 1) / 6, b_w)
    return (*(t.to(device) if isinstance(t, torch.Tensor) else t for t in found), 1e-5), grad.to(device)


def both(forward, backward, given, grad):
    means, height, w1, _, bn_weight, bn_bias, mean, var, w_h, _, w_w, _, eps = given
    gates, z, *statistics = forward(*given)
    fixed = mean is not None
    norm = (bn_weight, bn_bias, *((mean, var) if fixed else statistics))
    return gates, z, *statistics, *backward(grad, gates, means, z, height, w1, *norm, w_h, w_w, eps, fixed)


def doubled(given):
    return tuple(t.double() if isinstance(t, torch.Tensor) else t for t in given)


def hold(given, grad):
    """Against PyTorch in float64, and a second call, bit by bit."""
    found = both(kernels.line_gates_fwd, kernels.line_gates_bwd, given, grad)
    exact = both(ops.line_gates_fwd, ops.line_gates_bwd, doubled(given), grad.double())
    for got, want in zip(found, exact, strict=True):
        atol = 1e-5 * float(want.abs().max()) if len(want) else 0.0
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=atol)
    assert found[0].stride() == given[0].stride()
    again = both(kernels.line_gates_fwd, kernels.line_gates_bwd, given, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@on_devices
@pytest.mark.parametrize("channels_inside", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("affine", "fixed"), [(True, False), (False, False), (True, True), (False, True)])
def test_launchers_against_float64(device, channels_inside, affine, fixed):
    hold(*arguments(device, channels_inside, affine, fixed))


@on_devices
def test_images_that_programs_do_not_share_evenly(device, monkeypatch):
    """Of three images one program has two."""
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    hold(*arguments(device, hidden=3))


@on_devices
def test_equal_lines(device):
    """Their mean is exactly their value, their variance zero."""
    given, _ = arguments(device)
    means = given[0][:1, :, :1].expand(N, C, H + W).contiguous()
    given[2][:, 1:] = 0  # sums in any order are exact
    _, z, mean, var = kernels.line_gates_fwd(means, *given[1:])
    assert torch.equal(mean, z[0, 0])
    assert not var.any()


@on_devices
def test_no_images(device):
    given, grad = arguments(device)
    gates, z, *sums = both(kernels.line_gates_fwd, kernels.line_gates_bwd, (given[0][:0], *given[1:]), grad[:0])
    assert gates.shape == (0, C, H + W)
    assert z.shape == (0, H + W, HIDDEN)
    assert not any(s.any() for s in sums)


@on_devices
def test_gradients_in_the_weights_dtypes(device):
    given, grad = arguments(device)
    rounded = tuple(t.bfloat16() if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in given)
    found = both(kernels.line_gates_fwd, kernels.line_gates_bwd, rounded, grad)
    assert [t.dtype for t in found[-5:]] == [torch.bfloat16] * 5
    assert {t.dtype for t in found[:-5]} == {torch.float32}
    exact = tuple(t.float() if isinstance(t, torch.Tensor) else t for t in rounded)
    for got, want in zip(found, both(kernels.line_gates_fwd, kernels.line_gates_bwd, exact, grad), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-6)
