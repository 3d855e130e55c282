"""The linear layer over token grids, by oneDNN or PyTorch: values, gradients, strides, dtypes."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from cases import value_and_gradients
from visattn_fast.ops.linear import linear


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Makes oneDNN serve small products too."""
    monkeypatch.setattr(sys.modules["visattn_fast.ops.linear"], "_SMALL", 0)


@pytest.fixture
def tensors():
    """x ``[2, 3, 5, 8]``, a weight and a bias for 12 features."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in ((2, 3, 5, 8), (12, 8), (12,))]


def leaves(tensors, dtype=torch.float32):
    """Returns copies in ``dtype`` that require gradients; None stays None."""
    return [t if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def assert_near(got, want, tolerance):
    """Asserts that each tensor is within ``tolerance`` times the largest expected value."""
    for found, expected in zip(got, want, strict=True):
        allowed = tolerance * expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_strides_and_empty_batches_match_float64(tensors, biased):
    x, weight, bias = tensors
    for given in (x, x.transpose(1, 2), x[:1].expand(4, 3, 5, 8), x[:0]):
        inputs = (given, weight, bias if biased else None)
        got = value_and_gradients(linear, leaves(inputs))
        assert_near(got, value_and_gradients(F.linear, leaves(inputs, torch.float64)), 2e-6)


def test_gradient_of_x_with_frozen_weights(tensors):
    x, weight, bias = tensors
    (dx,) = torch.autograd.grad(linear(x.requires_grad_(), weight, bias).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, weight.sum(0).expand_as(dx))


def test_second_order_matches_float64(tensors):
    found = []
    for function, dtype in ((linear, torch.float32), (F.linear, torch.float64)):
        inputs = leaves(tensors, dtype)
        (dx,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), inputs))
    assert_near(*found, 1e-5)


def test_op_fits_its_contract(tensors):
    torch.library.opcheck(torch.ops.visattn_fast.linear_fwd.default, tuple(tensors))


def test_dtype_follows_autocast_and_inputs(tensors):
    x, weight, bias = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64
