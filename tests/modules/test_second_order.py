"""SOCA and criss-cross attention: their mathematics by the definition, degenerate maps, and what they allocate."""

from __future__ import annotations

import importlib

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED, feature_map
from visattn_fast import catalogue
from visattn_fast.reference.criss_cross import cross_weights
from visattn_fast.reference.soca import covariance, square_root, trace
from visattn_fast.report.cases import Case
from visattn_fast.report.contest import Contest

native_only = pytest.mark.skipif(INTERPRETED, reason="large maps")


def test_newton_schulz_tends_to_the_square_root():
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    root = square_root(covariance(x))
    torch.testing.assert_close(root @ root, covariance(x), rtol=0.02, atol=0.02)


def test_root_times_a_vector():
    """122 products with vectors give what the products of matrices give; so do their gradients."""
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


def test_root_by_cost():
    """Small matrices are multiplied, large ones are not: neither form is slower than the other where it serves."""
    ops = importlib.import_module("visattn_fast.ops.soca")
    sizes = {(1, 16): "_Matrices", (8, 64): "_Matrices", (8, 128): "_Vectors", (1, 512): "_Vectors"}
    found = {size: type(ops._root(torch.zeros(size[0], size[1], size[1]))).__name__ for size in sizes}
    assert found == sizes


@pytest.mark.parametrize("x", [torch.randn(2, 16, 1, 1), torch.full((2, 16, 4, 4), 0.5)], ids=["1x1", "constant"])
def test_nothing_varies(x):
    """The root of a covariance of zeros is zero, and no gradient goes through it."""
    for module in catalogue.ENTRIES["soca"].pair(16):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        first, _, second, _ = module.conv_du
        gate = torch.sigmoid(second(first.bias.relu().view(1, -1, 1, 1)))
        torch.testing.assert_close(y, x * gate)
        (dx,) = torch.autograd.grad(y.sum(), leaf)
        torch.testing.assert_close(dx, gate.expand_as(x))


@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
def test_covariance_far_from_zero(layout):
    """Centred before it is squared: a mean of a thousand deviations costs no digits."""
    x = feature_map((2, 8, 40, 50), layout, torch.float32) + 1000
    mean = torch.ops.visattn_fast.channel_mean(x)
    cov = torch.ops.visattn_fast.channel_covariance(x, mean)
    torch.testing.assert_close(mean.double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(cov.double(), covariance(x.double()), rtol=1e-3, atol=1e-3)


def test_criss_cross_by_the_definition():
    """Every position over its column and row, itself once."""
    _, plain = catalogue.ENTRIES["criss_cross"].pair(8, torch.float64)
    x = feature_map((1, 8, 4, 3), "nchw", torch.float64)
    q, k, v = (conv(x)[0] for conv in (plain.query_conv, plain.key_conv, plain.value_conv))
    expected = x.clone()
    for h in range(4):
        for w in range(3):
            cross = [(h, j) for j in range(3)] + [(i, w) for i in range(4) if i != h]
            weights = torch.stack([q[:, h, w] @ k[:, i, j] for i, j in cross]).softmax(0)
            out = sum(weight * v[:, i, j] for weight, (i, j) in zip(weights, cross, strict=True))
            expected[0, :, h, w] += plain.gamma * out
    torch.testing.assert_close(plain(x), expected)
    x = torch.randn(2, 16, 5, 4)
    assert torch.equal(vf.FastCrissCross(16)(x), x)  # gamma starts at zero


@pytest.mark.parametrize("shape", [(5, 8, 32, 30), (9, 8, 7, 33), (3, 8, 60, 50)])
def test_criss_cross_in_groups_of_images(shape):
    """Several images at a time, fewer in the last group, or one: each as by itself."""
    fast, plain = catalogue.ENTRIES["criss_cross"].pair(8, torch.float64)
    x = catalogue.feature_map(shape, dtype=torch.float64)
    results = []
    for module, parts in ((fast, [x]), (plain, x.split(1))):
        inputs = [part.clone().requires_grad_() for part in parts]
        y = torch.cat([module(part) for part in inputs])
        gradients = torch.autograd.grad(y.square().sum(), (*inputs, *module.parameters()))
        results.append((y, torch.cat(gradients[: len(inputs)]), *gradients[len(inputs) :]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_criss_cross_attention_is_what_others_give():
    _, plain = catalogue.ENTRIES["criss_cross"].pair(8)
    x = feature_map((2, 8, 5, 4), "nchw", torch.float32)
    column, row = cross_weights(plain.query_conv(x), plain.key_conv(x)).split([5, 4], 3)
    received = torch.einsum("nhwj->njw", column) + torch.einsum("nhwj->nhj", row) - row.diagonal(0, 2, 3)
    torch.testing.assert_close(plain.attention(x)["received"], (received / 7)[:, None])
    assert not plain.attention(x[:, :, :1, :1])["received"].any()


def allocated(op, shape, layout):
    """The peak of a training step beside x, the result and its gradients; in multiples of the bytes of x, and bytes."""
    contest = Contest(Case(op, shape, "float32", layout, "both"), torch.device("cpu"))
    run = contest.run("fused")
    run()
    peak = contest.peak_bytes(run)
    return peak / contest.x.nbytes - 2, peak


@native_only
@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
def test_memory(layout):
    """Neither an HW x HW matrix nor an H x W x (H + W) map."""
    assert allocated("soca", (1, 64, 250, 250), layout)[1] < 200e6 - 2 * 16e6
    assert allocated("criss_cross", (1, 64, 97, 97), layout)[0] <= 4
