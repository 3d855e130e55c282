"""SOCA: covariance and its square root, maps that do not vary, memory."""

from __future__ import annotations

import importlib

import pytest
import torch

from cases import feature_map, layouts
from peak import training_peak
from visattn_fast import catalogue
from visattn_fast.reference.soca import covariance, square_root, trace


def test_newton_schulz_converges_to_the_square_root():
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    root = square_root(covariance(x))
    torch.testing.assert_close(root @ root, covariance(x), rtol=0.02, atol=0.02)


def test_products_with_vectors_and_matrices_give_the_same_root():
    """122 products with vectors give the root times a vector, and its gradient, like the products of matrices."""
    ops = importlib.import_module("visattn_fast.ops.soca")
    cov = covariance(torch.randn(3, 6, 5, 7, dtype=torch.float64))
    total, v = trace(cov), ops._ones(cov)
    vectors, matrices = ops._Vectors(cov / total), ops._Matrices(cov / total)
    expected = square_root(cov).mean(1, keepdim=True)
    for root in (vectors, matrices):
        torch.testing.assert_close(root.apply(v) * total.sqrt(), expected)
    assert len(vectors.inputs) == 122
    a, g = (cov / total).requires_grad_(), torch.randn_like(v)
    (expected,) = torch.autograd.grad(ops._Matrices(a).apply(v), a, g)
    for form in (ops._Vectors, ops._Matrices):
        torch.testing.assert_close(form(a.detach()).gradient(v, g), (expected + expected.mT) / 2)


def test_form_of_the_root_depends_on_its_cost():
    """Small matrices are multiplied with each other, large ones with vectors, which is faster for them."""
    ops = importlib.import_module("visattn_fast.ops.soca")
    sizes = {(1, 16): "_Matrices", (8, 64): "_Matrices", (8, 128): "_Vectors", (1, 512): "_Vectors"}
    found = {size: type(ops._root(torch.zeros(size[0], size[1], size[1]))).__name__ for size in sizes}
    assert found == sizes


@pytest.mark.parametrize("x", [torch.randn(2, 16, 1, 1), torch.full((2, 16, 4, 4), 0.5)], ids=["1x1", "constant"])
def test_covariance_of_zeros_has_root_and_gradient_zero(x):
    for module in catalogue.ENTRIES["soca"].pair(16):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        first, _, second, _ = module.conv_du
        gate = torch.sigmoid(second(first.bias.relu().view(1, -1, 1, 1)))
        torch.testing.assert_close(y, x * gate)
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(dx, gate.expand_as(x))


@layouts
def test_covariance_is_exact_far_from_zero(layout):
    """Values are centred before they are squared: a mean of a thousand deviations costs no digits."""
    x = feature_map((2, 8, 40, 50), layout, torch.float32) + 1000
    mean = torch.ops.visattn_fast.channel_mean(x)
    cov, rest = torch.ops.visattn_fast.channel_covariance(x, mean)
    torch.testing.assert_close(mean.double() + rest.double() / 2000, x.double().mean((2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(cov.double(), covariance(x.double()), rtol=1e-3, atol=1e-3)


@layouts
def test_training_allocates_no_matrix_over_positions(layout):
    """x and the output gradient have 16 MB each; one matrix over positions would have 15.6 GB."""
    _, peak = training_peak("soca", (1, 64, 250, 250), layout)
    assert peak < 200e6 - 2 * 16e6
