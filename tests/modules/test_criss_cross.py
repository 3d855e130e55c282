"""Criss-cross attention: its definition, groups of images, its attention map, memory."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import feature_map, layouts
from peak import training_peak
from visattn_fast import catalogue
from visattn_fast.reference.criss_cross import cross_weights


def test_reference_matches_the_definition():
    """Every position attends to its column and its row, and to itself once."""
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


def test_new_module_is_the_identity():
    x = torch.randn(2, 16, 5, 4)
    assert torch.equal(vf.FastCrissCross(16)(x), x)  # gamma starts at zero


@pytest.mark.parametrize("shape", [(5, 8, 32, 30), (9, 8, 7, 33), (3, 8, 60, 50)])
def test_images_are_independent_of_their_group(shape):
    """Images go through in groups of several, with fewer in the last group, or one by one."""
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


def test_attention_map_is_the_weight_received_from_others():
    _, plain = catalogue.ENTRIES["criss_cross"].pair(8)
    x = feature_map((2, 8, 5, 4), "nchw", torch.float32)
    column, row = cross_weights(plain.query_conv(x), plain.key_conv(x)).split([5, 4], 3)
    received = torch.einsum("nhwj->njw", column) + torch.einsum("nhwj->nhj", row) - row.diagonal(0, 2, 3)
    torch.testing.assert_close(plain.attention(x)["received"], (received / 7)[:, None])
    assert not plain.attention(x[:, :, :1, :1])["received"].any()


@layouts
def test_training_allocates_no_map_of_weights(layout):
    """A map of H x W x (H + W) weights has three times the size of x; training would hold several."""
    multiple, _ = training_peak("criss_cross", (1, 64, 97, 97), layout)
    assert multiple <= 4
