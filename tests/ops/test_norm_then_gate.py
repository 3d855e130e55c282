"""A batch norm followed by a channel gate: in two fused passes without gradients, in PyTorch with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import visattn_fast as vf
from cases import (
    DTYPES,
    EPILOGUES,
    VIEWS,
    RecordedOps,
    feature_map,
    layouts,
    needs_dtype,
    oracle,
    poisoned,
    run,
    targets,
    within_budget,
)
from visattn_fast import catalogue
from visattn_fast.fused.normed import gate_normed_channels
from visattn_fast.ops.library import OPS
from visattn_fast.reference.batch_norm import Norm

ENTRY = catalogue.INFERENCE["normed_gate"]


def check(x: Tensor, backend: str, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """Asserts that the two passes serve and that their result is within the error budget; returns the result."""
    fast, plain = (m.to(x.device) for m in ENTRY.pair(x.shape[1], x.dtype))
    with vf.use_backend(backend), poisoned(), torch.no_grad(), RecordedOps() as recorded:
        y = fast(x, residual=residual, activation=activation)
    assert tuple(recorded.names) == ENTRY.ops
    exact, rounded = oracle(plain, x, residual, activation)
    eager = run(plain, x, residual, activation)
    within_budget({"y": y}, *({"y": found["y"]} for found in (eager, exact, rounded)))
    return y


@targets
@layouts
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues_match_reference(dtype, with_residual, activation, layout, device, backend):
    needs_dtype(backend, device, dtype)
    residual = feature_map((2, 24, 7, 6), layout, dtype, device, seed=2) if with_residual else None
    x = feature_map((2, 24, 7, 6), layout, dtype, device)
    y = check(x, backend, residual, activation)
    assert y.stride() == x.stride()


@targets
@layouts
@pytest.mark.parametrize("shape", [(3, 5, 7, 5), (1, 64, 13, 17), (2, 33, 1, 1), (1, 1, 3, 3), (0, 8, 4, 4)], ids=str)
def test_shapes_match_reference(shape, layout, device, backend):
    check(feature_map(shape, layout, torch.float32, device), backend)


@targets
@layouts
@pytest.mark.parametrize("view", VIEWS)
def test_strided_maps_match_reference(view, layout, device, backend):
    x = VIEWS[view](feature_map((2, 8, 6, 5), layout, torch.float32, device), layout)
    check(x, backend, feature_map((2, 8, 6, 5), "nchw", torch.float32, device, seed=2), "relu")


def test_large_mean_costs_no_digits_without_gradients():
    """If the mean is large, the error is that of a sum of such values."""
    fast, plain = ENTRY.pair(64)
    x = 1000 + feature_map((3, 64, 28, 29), "nchw", torch.float32)
    for module in (fast, plain):
        module.norm.running_mean += 1000
        module.gate = nn.Sigmoid()
    with torch.no_grad():
        y = fast(x)
        exact = plain.double()(x.double())
    assert (y - exact).abs().max() < 4 * 1000 * torch.finfo(torch.float32).eps


def test_gradients_match_reference():
    """The form in PyTorch serves, whichever input requires a gradient."""
    fast, plain = ENTRY.pair(8, torch.float64)
    x, residual = (feature_map((2, 8, 5, 4), "nchw", torch.float64, seed=i) for i in range(2))
    for wanted in ("x", "residual", "norm.weight", "gate.0.weight"):
        found = []
        for module in (fast, plain):
            module.requires_grad_(False)
            inputs = {"x": x.clone(), "residual": residual.clone(), **dict(module.named_parameters())}
            leaf = inputs[wanted].requires_grad_()
            if module is fast:
                y = module(inputs["x"], residual=inputs["residual"], activation="silu")
            else:
                y = vf.reference.epilogue(module(inputs["x"]), inputs["residual"], "silu")
            found.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_wider_residual_widens_the_result():
    """PyTorch serves a residual of a wider dtype than the map."""
    fast, plain = ENTRY.pair(8)
    x, residual = feature_map((2, 8, 5, 4), "nchw", torch.bfloat16), feature_map((2, 8, 5, 4), "nchw", torch.float32)
    with torch.no_grad(), RecordedOps() as recorded:
        fast.gate = plain.gate = nn.Sigmoid()
        y = fast(x, residual=residual)
    assert recorded.names == []
    torch.testing.assert_close(y, plain(x.float()) + residual, rtol=0.01, atol=0.01)


def norm_and_map() -> tuple[Norm, torch.Tensor]:
    """Returns a norm whose mean is far from zero, and a map of such values."""
    torch.manual_seed(0)
    weight, bias, mean, var = torch.randn(32), torch.randn(32), 30 + torch.randn(32), 0.5 + torch.rand(32)
    return Norm(weight, bias, mean, var, 1e-5), 30 + feature_map((2, 32, 9, 7), "nchw", torch.float32)


@pytest.mark.parametrize("gate", [vf.FastSE(32, 4), vf.FastECA(32)], ids=lambda g: type(g).__name__)
def test_norm_argument_of_se_and_eca_is_one_op(gate):
    """`functional.se` and `functional.eca` take a norm: in one op, or in PyTorch if a gradient is required."""
    norm, x = norm_and_map()
    function = vf.functional.se if isinstance(gate, vf.FastSE) else vf.functional.eca
    weights = [None if w is None else w.detach() for w in gate.weights()]
    want = function(norm.apply(x), *weights, residual=x, activation="relu")
    with RecordedOps() as recorded:
        y = function(x, *weights, residual=x, activation="relu", norm=norm)
    assert recorded.names == [f"{function.__name__}_normed"]
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    op = getattr(torch.ops.visattn_fast, f"{function.__name__}_normed").default
    codes = (2, 1, 0) if function is vf.functional.se else (2,)
    torch.library.opcheck(op, (x, *norm, *weights, x, *codes), test_utils=("test_schema", "test_faketensor"))
    plain = OPS[op._opname].reference(x, *norm, *weights, x, *codes)
    torch.testing.assert_close(op(x, *norm, *weights, x, *codes), plain, rtol=1e-4, atol=1e-4)
    leaf = x.clone().requires_grad_()
    (fused,) = torch.autograd.grad(function(leaf, *weights, norm=norm).sum(), leaf)
    (exact,) = torch.autograd.grad(function(norm.apply(leaf), *weights).sum(), leaf)
    torch.testing.assert_close(fused, exact)
    with pytest.raises(ValueError, match=r"running_mean must have shape \[32\], got \[3\]"):
        function(x, *weights, norm=norm._replace(running_mean=torch.zeros(3)))


def test_training_form_sums_in_float32_and_checks_its_input():
    """The result has the dtype of z, or the wider one of z and the residual."""
    z = (3 + catalogue.feature_map((2, 32, 5, 4))).bfloat16()
    norm = nn.BatchNorm2d(32)
    options = {"training": True, "momentum": 0.0, "eps": norm.eps}
    weights = (norm.weight, norm.bias, None, None)
    want = norm(z.float()) * 0.25
    y = gate_normed_channels(z, *weights, lambda mean: torch.full_like(mean, 0.25), **options)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.01, atol=1e-3)
    y = gate_normed_channels(z, *weights, lambda mean: torch.full_like(mean, 0.25), residual=want, **options)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, 2 * want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        gate_normed_channels(z[:1, :, :1, :1], *weights, torch.sigmoid, **options)
    with pytest.raises(ValueError, match=r"gate must return shape \[2, 32, 1, 1\]"):
        gate_normed_channels(z, *weights, lambda mean: mean[0], **options)


def test_training_form_keeps_the_variance_of_a_large_mean():
    """A mean far from zero does not cancel the variance; a constant channel has none, and becomes zero."""
    z = 1000 + catalogue.feature_map((2, 32, 8, 8))
    z[:, 0] = 7
    norm = nn.BatchNorm2d(32)
    want = nn.BatchNorm2d(32).double()(z.double())
    weights = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    y = gate_normed_channels(z, *weights, torch.ones_like, training=True, momentum=0.1, eps=norm.eps)
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-3)
    assert not y[:, 0].any()
