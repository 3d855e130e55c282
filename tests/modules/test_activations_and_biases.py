"""Options of SE, CBAM and spatial attention that other libraries' modules need: activations and biases."""

from __future__ import annotations

import itertools

import pytest
import torch

import visattn_fast as vf
from cases import DTYPES, check, feature_map, layouts, needs_dtype, targets
from variants import BIASED, se_with
from visattn_fast import reference

biased = pytest.mark.parametrize("name", BIASED)


@targets
@pytest.mark.parametrize(("hidden", "gate"), list(itertools.product(("relu", "silu"), ("sigmoid", "hard_sigmoid"))))
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_se_with_other_activations_matches_reference(hidden, gate, layout, dtype, device, backend):
    needs_dtype(backend, device, dtype)
    check(se_with(hidden, gate), feature_map((2, 24, 7, 6), layout, dtype, device), backend)


@targets
@biased
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_with_a_bias_matches_reference(name, layout, dtype, device, backend):
    needs_dtype(backend, device, dtype)
    check(BIASED[name], feature_map((3, 24, 7, 6), layout, dtype, device), backend)


@targets
@biased
def test_bias_on_empty_and_one_pixel_maps_gives_the_same_bits(name, device, backend):
    """Each map matches the reference, and a second run gives the same bits."""
    for shape in ((0, 8, 4, 4), (2, 8, 1, 1), (2, 8, 5, 3)):
        x = feature_map(shape, "nchw", torch.float32, device)
        first, again = check(BIASED[name], x, backend), check(BIASED[name], x, backend)
        assert all(torch.equal(t, again[key]) for key, t in first.items())


def test_cbam_with_a_large_kernel_and_bias_matches_reference():
    """A published CBAM variant has a 49 x 49 spatial kernel, larger than most maps, a bias, and x as its residual."""
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


@biased
def test_both_orders_of_the_bias_match_finite_differences(name):
    fast, _ = BIASED[name].pair(4, torch.float64)
    x = feature_map((2, 4, 3, 3), "nchw", torch.float64)
    call = getattr(vf.functional, name)
    epilogue = {"residual": x, "activation": "silu"} if BIASED[name].epilogue else {}

    *weights, conv_bias = fast.weights()

    def biased(x, bias):
        return call(x, *weights, bias=bias, **epilogue)

    inputs = (x.clone().requires_grad_(), conv_bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(biased, inputs)
    assert torch.autograd.gradgradcheck(biased, inputs, fast_mode=True)


@pytest.mark.parametrize("hidden", ["relu", "silu"])
def test_both_orders_of_se_match_finite_differences(hidden):
    module, _ = se_with(hidden, "hard_sigmoid").pair(4, torch.float64)
    weights = [w.detach().requires_grad_() for w in module.weights()]
    x = feature_map((2, 4, 3, 3), "nchw", torch.float64).requires_grad_()

    def call(x, *weights):
        return vf.functional.se(x, *weights, hidden_activation=hidden, gate_activation="hard_sigmoid")

    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *weights))


@pytest.mark.parametrize("function", [vf.functional.se, reference.se], ids=["fast", "reference"])
@pytest.mark.parametrize("name", ["hidden_activation", "gate_activation"])
def test_unknown_activation_raises(function, name):
    weights = (torch.ones(2, 8), None, torch.ones(8, 2), None)
    with pytest.raises(ValueError, match=rf"{name} must be one of \(.*\), got 'gelu'"):
        function(torch.ones(1, 8, 2, 2), *weights, **{name: "gelu"})
