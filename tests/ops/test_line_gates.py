"""The gates of rows and columns beyond what coordinate attention's own tests have: many hidden channels, no affine."""

from __future__ import annotations

import importlib

import pytest
import torch

from cases import TARGETS
from visattn_fast.ops import line_gates as ops
from visattn_fast.ops.library import OPS

NONE = pytest.param("none", "none", marks=pytest.mark.skip(reason="needs the native library, or Triton"))
on_kernels = pytest.mark.parametrize(("device", "backend"), TARGETS or [NONE])

N, C, H, W = 3, 40, 17, 3
HIDDEN = 36  # as C: two blocks, of which one is not full


def kernels(backend):
    """Those of both directions. The native ones serve the ops themselves on CPUs."""
    if backend == "cpp":
        return ops.line_gates_fwd, ops.line_gates_bwd
    launchers = importlib.import_module("visattn_fast.kernels.ops.line_gates")
    return launchers.line_gates_fwd, launchers.line_gates_bwd


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


def exactly(given, grad):
    """By PyTorch in float64."""
    return both(OPS["line_gates_fwd"].reference, OPS["line_gates_bwd"].reference, doubled(given), grad.double())


def hold(given, grad, backend, tolerance=1e-5):
    """Against PyTorch in float64, and a second call, bit by bit."""
    found = both(*kernels(backend), given, grad)
    for got, want in zip(found, exactly(given, grad), strict=True):
        atol = tolerance * float(want.abs().max()) if len(want) else 0.0
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=atol)
    assert found[0].stride() == given[0].stride()
    again = both(*kernels(backend), given, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@on_kernels
@pytest.mark.parametrize("channels_inside", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("affine", "fixed"), [(True, False), (False, False), (True, True), (False, True)])
def test_kernels_against_float64(device, backend, channels_inside, affine, fixed):
    hold(*arguments(device, channels_inside, affine, fixed), backend)


@on_kernels
def test_images_that_programs_do_not_share_evenly(device, backend, monkeypatch):
    """Of three blocks of columns one program has two."""
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("visattn_fast.kernels.ops.line_gates"), "PROGRAMS", 4)
    hold(*arguments(device, hidden=3), backend)


@pytest.mark.parametrize("channels_inside", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("images", [1, 5])
def test_any_number_of_threads(channels_inside, images):
    """The same bits, of images that threads have to themselves or share."""
    if ("cpu", "cpp") not in TARGETS:
        pytest.skip("needs the native library")
    given, grad = arguments("cpu", channels_inside)
    means, grad = (torch.cat([t, t.flip(0)])[:images].repeat_interleave(12, 2) for t in (given[0], grad))
    if channels_inside:
        means, grad = (t.mT.contiguous().mT for t in (means, grad))
    given, before, found = (means, 12 * H, *given[2:]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(*kernels("cpp"), given, grad))
    finally:
        torch.set_num_threads(before)
    hold(given, grad, "cpp")
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


def test_float64():
    if ("cpu", "cpp") not in TARGETS:
        pytest.skip("needs the native library")
    given, grad = arguments("cpu")
    hold(doubled(given), grad.double(), "cpp", 1e-13)


@on_kernels
def test_ends_of_hardswish(device, backend):
    """Where it bends; and of what is no number, of which the interpreter warns."""
    given, grad = arguments(device, hidden=4)
    w1, w_h, w_w = torch.zeros_like(given[2]), *(torch.full_like(given[i], 0.1) for i in (8, 10))
    ones, zeros = torch.ones(4, device=device), torch.zeros(4, device=device)
    beyond = (float("nan"), float("inf"), -float("inf")) if backend == "cpp" else ()
    for values in ((-3, 3, 2.9, -2.9), *((0, 1, value, 2) for value in beyond)):
        b1 = torch.tensor(values, device=device, dtype=torch.float32)
        args = (given[0], H, w1, b1, ones, zeros, zeros, ones, w_h, None, w_w, None, 0.0)
        found = both(*kernels(backend), args, grad)
        for got, want in zip(found, exactly(args, grad), strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


@on_kernels
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under the interpreter, of NaN that is meant
def test_nan_does_not_pass_where_the_hardswish_is_shut(device, backend):
    given, grad = arguments(device, hidden=8)
    bias = torch.linspace(-8, 8, 8, device=device)
    args = (*given[:4], torch.zeros_like(bias), bias, *given[6:])
    grad[0, 0, 0] = float("nan")
    found = both(*kernels(backend), args, grad)
    assert found[-3].isnan().any(1).sum() == (bias > -3).sum()
    for got, want in zip(found, exactly(args, grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@on_kernels
def test_equal_lines(device, backend):
    """Their mean is exactly their value, their variance zero."""
    given, _ = arguments(device)
    means = given[0][:1, :, :1].expand(N, C, H + W).contiguous()
    given[2][:, 1:] = 0  # sums in any order are exact
    _, z, mean, var = kernels(backend)[0](means, *given[1:])
    assert torch.equal(mean, z[0, 0])
    assert not var.any()


@on_kernels
def test_no_images(device, backend):
    given, grad = arguments(device)
    gates, z, *sums = both(*kernels(backend), (given[0][:0], *given[1:]), grad[:0])
    assert gates.shape == (0, C, H + W)
    assert z.shape == (0, H + W, HIDDEN)
    assert not any(s.any() for s in sums)


@on_kernels
def test_gradients_in_the_weights_dtypes(device, backend):
    given, grad = arguments(device)
    rounded = tuple(t.bfloat16() if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in given)
    found = both(*kernels(backend), rounded, grad)
    assert [t.dtype for t in found[-3:]] == [torch.bfloat16] * 3
    assert {t.dtype for t in found[:-3]} == {torch.float32}
    exact = tuple(t.float() if isinstance(t, torch.Tensor) else t for t in rounded)
    for got, want in zip(found, both(*kernels(backend), exact, grad), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-6)
