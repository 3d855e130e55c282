"""The gates of rows and columns: more cases than coordinate attention has, with many hidden channels or no affine."""

from __future__ import annotations

import importlib

import pytest
import torch

from cases import TARGETS, targets, threads
from visattn_fast.ops import line_gates as ops
from visattn_fast.ops.library import OPS

formats = pytest.mark.parametrize("channels_inside", [False, True], ids=["nchw", "channels_last"])
native = pytest.mark.skipif(("cpu", "cpp") not in TARGETS, reason="needs the native library")

N, C, H, W = 3, 40, 17, 3
HIDDEN = 36  # two blocks, one of them not full, as for C


def kernels(backend):
    """Returns the kernels of both directions. The ops themselves call the native ones on CPUs."""
    if backend == "cpp":
        return ops.line_gates_fwd, ops.line_gates_bwd
    launchers = importlib.import_module("visattn_fast.kernels.ops.line_gates")
    return launchers.line_gates_fwd, launchers.line_gates_bwd


def arguments(device, channels_inside=False, affine=True, fixed=False, hidden=HIDDEN):
    """Returns float32 arguments of the forward op, and a gradient of its gates."""
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
    """Returns all results of the forward op, and of the backward op behind it."""
    means, height, w1, _, bn_weight, bn_bias, mean, var, w_h, _, w_w, _, eps = given
    gates, z, *statistics = forward(*given)
    fixed = mean is not None
    norm = (bn_weight, bn_bias, *((mean, var) if fixed else statistics))
    return gates, z, *statistics, *backward(grad, gates, means, z, height, w1, *norm, w_h, w_w, eps, fixed)


def doubled(given):
    return tuple(t.double() if isinstance(t, torch.Tensor) else t for t in given)


def exactly(given, grad):
    """Returns the results of both ops in PyTorch and float64."""
    return both(OPS["line_gates_fwd"].reference, OPS["line_gates_bwd"].reference, doubled(given), grad.double())


def assert_matches_float64(given, grad, backend, tolerance=1e-5):
    """Asserts that both ops match PyTorch in float64, and that a second call gives the same bits."""
    found = both(*kernels(backend), given, grad)
    for got, want in zip(found, exactly(given, grad), strict=True):
        atol = tolerance * float(want.abs().max()) if len(want) else 0.0
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=atol)
    assert found[0].stride() == given[0].stride()
    again = both(*kernels(backend), given, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@targets
@formats
@pytest.mark.parametrize(("affine", "fixed"), [(True, False), (False, False), (True, True), (False, True)])
def test_kernels_match_float64(device, backend, channels_inside, affine, fixed):
    assert_matches_float64(*arguments(device, channels_inside, affine, fixed), backend)


@targets
def test_uneven_shares_of_programs_match_float64(device, backend, monkeypatch):
    """One program has two of three blocks of columns."""
    if backend == "triton":
        kernels = importlib.import_module("visattn_fast.kernels.passes.lines.gate_grads")
        monkeypatch.setattr(kernels, "PROGRAMS", 4)
    assert_matches_float64(*arguments(device, hidden=3), backend)


@native
@formats
@pytest.mark.parametrize("images", [1, 5])
def test_threads_do_not_change_the_bits(channels_inside, images):
    """Threads share one image, or each has images of its own."""
    given, grad = arguments("cpu", channels_inside)
    means, grad = (torch.cat([t, t.flip(0)])[:images].repeat_interleave(12, 2) for t in (given[0], grad))
    if channels_inside:
        means, grad = (t.mT.contiguous().mT for t in (means, grad))
    given, found = (means, 12 * H, *given[2:]), []
    for count in (1, 2, 3):
        with threads(count):
            found.append(both(*kernels("cpp"), given, grad))
    assert_matches_float64(given, grad, "cpp")
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


@native
def test_float64_keeps_its_precision():
    given, grad = arguments("cpu")
    assert_matches_float64(doubled(given), grad.double(), "cpp", 1e-13)


@targets
def test_hardswish_at_its_ends_matches_float64(device, backend):
    """Hidden values are at or near -3 and 3; in the native kernels, which raise no warnings, also NaN and Inf."""
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


@targets
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy in the interpreter, about intended NaN
def test_nan_gradient_stops_where_hardswish_is_zero(device, backend):
    given, grad = arguments(device, hidden=8)
    bias = torch.linspace(-8, 8, 8, device=device)
    args = (*given[:4], torch.zeros_like(bias), bias, *given[6:])
    grad[0, 0, 0] = float("nan")
    found = both(*kernels(backend), args, grad)
    assert found[-3].isnan().any(1).sum() == (bias > -3).sum()
    for got, want in zip(found, exactly(args, grad), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@targets
def test_equal_lines_have_an_exact_mean_and_no_variance(device, backend):
    given, _ = arguments(device)
    means = given[0][:1, :, :1].expand(N, C, H + W).contiguous()
    given[2][:, 1:] = 0  # sums in any order are exact
    _, z, mean, var = kernels(backend)[0](means, *given[1:])
    assert torch.equal(mean, z[0, 0])
    assert not var.any()


@targets
def test_empty_batch_gives_empty_gates_and_zero_gradients(device, backend):
    given, grad = arguments(device)
    gates, z, *sums = both(*kernels(backend), (given[0][:0], *given[1:]), grad[:0])
    assert gates.shape == (0, C, H + W)
    assert z.shape == (0, H + W, HIDDEN)
    assert not any(s.any() for s in sums)


@targets
def test_gradients_have_their_weights_dtypes(device, backend):
    given, grad = arguments(device)
    rounded = tuple(t.bfloat16() if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in given)
    found = both(*kernels(backend), rounded, grad)
    assert [t.dtype for t in found[-3:]] == [torch.bfloat16] * 3
    assert {t.dtype for t in found[:-3]} == {torch.float32}
    exact = tuple(t.float() if isinstance(t, torch.Tensor) else t for t in rounded)
    for got, want in zip(found, both(*kernels(backend), exact, grad), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-6)
