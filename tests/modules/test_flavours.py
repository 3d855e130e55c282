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


class _CBAM(reference.CBAM):
    """`reference.CBAM` with a bias in its spatial gate."""

    function = staticmethod(reference.cbam)

    def __init__(self, channels):
        super().__init__(channels, reduction=4, kernel_size=3)
        self.bias = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x, **epilogue):
        return self.function(x, *self.weights(), bias=self.bias, **epilogue)


class _FastCBAM(_CBAM):
    function = staticmethod(vf.functional.cbam)


class _Spatial(reference.SpatialAttention):
    """`reference.SpatialAttention` with a bias."""

    function = staticmethod(reference.spatial_attention)

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([-0.4]))

    def forward(self, x):
        return self.function(x, *self.weights(), bias=self.bias)


class _FastSpatial(_Spatial):
    function = staticmethod(vf.functional.spatial_attention)


BIASED = {
    "cbam": catalogue.Entry("cbam", _FastCBAM, _CBAM, lambda c: {"channels": c}, 4, 5),
    "spatial_attention": catalogue.Entry(
        "spatial_attention", _FastSpatial, _Spatial, lambda c: {"channels": c}, 1, 1, epilogue=False
    ),
}
biased = pytest.mark.parametrize("name", BIASED)


@pytest.mark.parametrize(("device", "backend"), TARGETS)
@biased
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_bias(name, layout, dtype, device, backend):
    """Values and every gradient, the bias's too."""
    needs_dtype(backend, device, dtype)
    check(BIASED[name], feature_map((3, 24, 7, 6), layout, dtype, device), backend)


@pytest.mark.parametrize(("device", "backend"), TARGETS)
@biased
def test_bias_of_no_image_and_of_one_pixel(name, device, backend):
    """And the same bits every time."""
    for shape in ((0, 8, 4, 4), (2, 8, 1, 1), (2, 8, 5, 3)):
        x = feature_map(shape, "nchw", torch.float32, device)
        first, again = check(BIASED[name], x, backend), check(BIASED[name], x, backend)
        assert all(torch.equal(t, again[key]) for key, t in first.items())


@pytest.mark.skipif(INTERPRETED, reason="the number of threads is nothing to Triton")
@biased
def test_bias_with_any_number_of_threads(name):
    fast, _ = BIASED[name].pair(32)
    x, before, results = feature_map((3, 32, 28, 29), "nchw", torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(fast(x).square().sum(), fast.bias)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(INTERPRETED, reason="2401 taps a pixel, too slow in the interpreter")
def test_large_kernel_and_residual():
    """The copy of CBAM whose spatial kernel is larger than most maps, with a bias, and x added."""
    x = feature_map((2, 16, 9, 30), "nchw", torch.float64)
    weights = [feature_map(s, "nchw", torch.float64, seed=1) for s in ((4, 16, 1, 1), (16, 4, 1, 1), (1, 2, 49, 49))]
    weights[2] /= 49
    found = []
    for function in (vf.functional.cbam, reference.cbam):
        inputs = [t.clone().requires_grad_() for t in (x, *weights, torch.tensor([0.3], dtype=torch.float64))]
        epilogue = {"residual": inputs[0]} if function is vf.functional.cbam else {}
        y = function(*inputs[:4], bias=inputs[4], **epilogue)
        y = y if epilogue else y + inputs[0]
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations, too slow in the interpreter")
@biased
def test_gradcheck_of_the_bias(name):
    fast, _ = BIASED[name].pair(4, torch.float64)
    x = feature_map((2, 4, 3, 3), "nchw", torch.float64)
    call = {"cbam": vf.functional.cbam, "spatial_attention": vf.functional.spatial_attention}[name]
    epilogue = {"cbam": {"residual": x, "activation": "silu"}, "spatial_attention": {}}[name]

    def biased(x, bias):
        return call(x, *fast.weights(), bias=bias, **epilogue)

    inputs = (x.clone().requires_grad_(), fast.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(biased, inputs)
    assert torch.autograd.gradgradcheck(biased, inputs, fast_mode=True)


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
