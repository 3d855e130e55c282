"""Gates whose mathematics the caller brings match the reference: ties, strides, NaN, epilogues, derivatives."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import EPILOGUES, check, feature_map, layouts, needs_dtype, targets
from variants import CUSTOM
from visattn_fast import catalogue, reference

C = 24  # channels
kinds = pytest.mark.parametrize("kind", CUSTOM)
# Without ties; zeros after a ReLU, in whole columns too; few values; all values equal.
INPUTS = {
    "normal": lambda x: x,
    "relu": lambda x: x.relu() * (torch.arange(x.shape[3], device=x.device) % 3 != 0),
    "steps": lambda x: x.round(),
    "constant": lambda x: torch.full_like(x, 0.75),
}


@targets
@layouts
@kinds
@pytest.mark.parametrize("shape", [(2, C, 7, 6), (3, 5, 9, 11), (2, 8, 1, 3), (0, 8, 4, 4)], ids=str)
def test_shapes_match_reference(kind, shape, layout, device, backend):
    check(CUSTOM[kind], feature_map(shape, layout, torch.float32, device), backend)


@targets
@layouts
@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_match_reference(kind, dtype, layout, device, backend):
    needs_dtype(backend, device, dtype)
    check(CUSTOM[kind], feature_map((2, C, 7, 6), layout, dtype, device), backend)


@targets
@layouts
@pytest.mark.parametrize("inputs", list(INPUTS)[1:])
@pytest.mark.parametrize("kind", ["even", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_of_maxima_match_reference(dtype, kind, inputs, layout, device, backend):
    """Ties share the gradient evenly, as in `torch.amax`, or the first takes it, as in `torch.max`."""
    x = INPUTS[inputs](feature_map((2, C, 9, 10), layout, dtype, device)).contiguous(
        memory_format=catalogue.LAYOUTS[layout]
    )
    check(CUSTOM[kind], x, backend)


@targets
@layouts
@kinds
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES[1:])
def test_epilogues_match_reference(kind, with_residual, activation, layout, device, backend):
    fast, plain = (m.to(device) for m in CUSTOM[kind].pair(C, torch.float64))
    shape, results = (2, C, 5, 7), []
    for module in (fast, plain):
        x = feature_map(shape, layout, torch.float64, device).requires_grad_()
        residual = feature_map(shape, layout, torch.float64, device, seed=3).requires_grad_() if with_residual else None
        with vf.use_backend(backend):
            if module is fast:
                y = module(x, residual=residual, activation=activation)
            else:
                y = reference.epilogue(module(x), residual, activation)
        inputs = [x, *(p for p in module.parameters()), *([residual] if with_residual else [])]
        grad = feature_map(shape, "nchw", torch.float64, device, seed=1)
        results.append([y, *torch.autograd.grad(y, inputs, grad, allow_unused=True)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    assert results[0][0].stride() == results[0][1].stride() == x.stride()


@targets
@kinds
def test_nan_spreads_as_in_reference(kind, device, backend):
    """A NaN spreads in result and gradient to the values that depend on it, and to no other."""
    fast, plain = (m.to(device).eval() for m in CUSTOM[kind].pair(C))
    results = []
    for module in (fast, plain):
        x = feature_map((2, C, 8, 9), "nchw", torch.float32, device)
        x[1, 3, 2, 4] = float("nan")
        x.requires_grad_()
        with vf.use_backend(backend):
            y = module(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        results.append((y.isnan(), dx.isnan()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0][1].any()
    assert not results[0][0][0].any()


@targets
@kinds
def test_strided_maps_match_reference(kind, device, backend):
    base = feature_map((2, 2 * C, 7, 12), "nchw", torch.float32, device)
    for x in (base[:, ::2], base[:, :C, :, ::2], base[:1, :C].expand(2, -1, -1, -1), base[:, :C].mT):
        check(CUSTOM[kind], x, backend)


@kinds
def test_both_orders_match_finite_differences(kind):
    fast, _ = CUSTOM[kind].pair(4, torch.float64)
    x = feature_map((2, 4, 3, 4), "nchw", torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(fast, (x,))
    assert torch.autograd.gradgradcheck(fast, (x,), fast_mode=True)


@kinds
def test_both_orders_of_ties_match_reference(kind):
    """Finite differences say nothing about equal maxima."""
    fast, _ = CUSTOM[kind].pair(4, torch.float64)
    x = INPUTS["relu"](feature_map((2, 4, 3, 4), "nchw", torch.float64)).requires_grad_()
    grads = []
    for backend in ("auto", "reference"):
        with vf.use_backend(backend):
            (dx,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
            grads.append([dx, *torch.autograd.grad(dx.square().sum(), [x, *fast.parameters()], allow_unused=True)])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("functions", [vf.functional, reference], ids=["fused", "reference"])
def test_gates_on_another_device_are_refused(functions):
    """Also between layers of the caller's, which may have been left on another device."""
    x = feature_map((2, 8, 5, 4), "nchw", torch.float32)

    def elsewhere(*sizes):
        return lambda *_: torch.rand(sizes, device="meta")

    def here(*sizes):
        return lambda *_: torch.rand(sizes)

    with pytest.raises(ValueError, match="gate must return a tensor on the device of x, cpu, got meta"):
        functions.gate_channels(x, elsewhere(2, 8, 1, 1))
    for gates, name in (
        ((elsewhere(2, 8, 1, 1), here(2, 1, 5, 4)), "channel"),
        ((here(2, 8, 1, 1), elsewhere(2, 1, 5, 4)), "spatial"),
    ):
        with pytest.raises(ValueError, match=f"{name} must return a tensor on the device of x"):
            functions.gate_twice(x, *gates)
