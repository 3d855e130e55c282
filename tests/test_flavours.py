"""Variants of a gate that other libraries' modules are: activations, biases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import INTERPRETED, TARGETS, check, feature_map, needs_dtype
from visattn_fast import catalogue, reference

layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)


class _SE(reference.SE):
    """`reference.SE` with the activations that its last two arguments name."""

    function = staticmethod(reference.se)

    def __init__(self, channels, hidden_activation, gate_activation):
        super().__init__(channels, reduction=4, bias=True)
        nn.init.normal_(self.fc[2].bias, std=3)  # some gates beyond the ends of the hard sigmoid
        self.names = {"hidden_activation": hidden_activation, "gate_activation": gate_activation}

    def forward(self, x):
        return self.function(x, *self.weights(), **self.names)


class _FastSE(_SE):
    function = staticmethod(vf.functional.se)


@pytest.mark.parametrize(("device", "backend"), TARGETS)
@pytest.mark.parametrize(("hidden", "gate"), list(itertools.product(("relu", "silu"), ("sigmoid", "hard_sigmoid"))))
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_se(hidden, gate, layout, dtype, device, backend):
    needs_dtype(backend, device, dtype)
    entry = catalogue.Entry(
        "se", _FastSE, _SE, lambda c: {"channels": c, "hidden_activation": hidden, "gate_activation": gate}, 3, 4
    )
    check(entry, feature_map((2, 24, 7, 6), layout, dtype, device), backend)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations, too slow in the interpreter")
@pytest.mark.parametrize("hidden", ["relu", "silu"])
def test_gradcheck(hidden):
    module = _FastSE(4, hidden, "hard_sigmoid").double()
    weights = [w.detach().requires_grad_() for w in module.weights()]
    x = feature_map((2, 4, 3, 3), "nchw", torch.float64).requires_grad_()

    def call(x, *weights):
        return vf.functional.se(x, *weights, hidden_activation=hidden, gate_activation="hard_sigmoid")

    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *weights))


@pytest.mark.parametrize("function", [vf.functional.se, reference.se], ids=["fast", "reference"])
@pytest.mark.parametrize("name", ["hidden_activation", "gate_activation"])
def test_unknown_activation(function, name):
    weights = (torch.ones(2, 8), None, torch.ones(8, 2), None)
    with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\), got 'gelu'"):
        function(torch.ones(1, 8, 2, 2), *weights, **{name: "gelu"})
