"""No result is more than twice as wrong as eager PyTorch's, on standard maps, on large ones and far from zero."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import TARGETS, entries, layouts
from tools.numerics import DTYPES, SHAPE, TALL, Case, measure
from visattn_fast import catalogue, reference
from visattn_fast.catalogue import ENTRIES
from visattn_fast.measure.accuracy import EAGER, UNITS, largest

pytestmark = pytest.mark.skipif(("cpu", "cpp") not in TARGETS, reason="needs the native library")

EPS = torch.finfo(torch.float32).eps
LONG = (1, 4, 512, 512)
LONG_MODULES = ("eca", "scse", "local_attention", "cbam", "coord_att", "triplet_attention", "simam", "nam", "sk_eval")


@entries
@layouts
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tensor_is_twice_as_wrong_as_eager(entry, layout, dtype):
    assert not measure(Case(entry, SHAPE, layout, dtype)).worse


@pytest.mark.parametrize("name", LONG_MODULES)
@layouts
@pytest.mark.parametrize("values", ["standard", "0.1"])
def test_large_maps_are_not_twice_as_wrong_as_eager(name, layout, values):
    if (name, values) == ("coord_att", "0.1"):
        pytest.skip("the batch norm of equal values magnifies the last bit of a mean 316 times")
    assert not measure(Case(ENTRIES[name], LONG, layout, "fp32", values)).worse


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("self_attention", "mean 100"),
        ("self_attention", "mean 1000"),
        ("criss_cross", "mean 100"),
        ("criss_cross", "mean 1000"),
        ("window_attention", "mean 100"),
        ("soca", "mean 1000"),
    ],
)
@layouts
def test_maps_far_from_zero_are_not_twice_as_wrong_as_eager(name, values, layout):
    assert not measure(Case(ENTRIES[name], SHAPE, layout, "fp32", values)).worse


@layouts
def test_rounding_of_a_mean_does_not_reach_weights(layout):
    """A mean of a batch that is rounded makes the gradients of what it normalises add up to more than zero."""
    errors = measure(Case(ENTRIES["coord_att"], SHAPE, layout, "fp32", "mean 1000"))
    assert errors.fused["dconv1.weight"] <= 0.1 * errors.eager["dconv1.weight"]


def error(found, exact):
    return largest((found.double() - exact).detach()) / (largest(exact.detach()) or 1.0)


@pytest.mark.parametrize("shape", [(1, 2, 512, 512), TALL], ids=["512x512", "2^24 pixels"])
@layouts
def test_means_of_equal_values_do_not_drift(shape, layout):
    """Sums of equal values round alike at each step, so their errors add up."""
    x = torch.full(shape, 0.1).contiguous(memory_format=catalogue.LAYOUTS[layout])
    exact = x.flatten()[0].double()
    ops = torch.ops.visattn_fast
    means = [ops.channel_mean(x), ops.axis_mean(x), ops.pool_pixels(x, False)[0][:, 0]]
    for mean in means:
        assert error(mean, exact) <= 3 * EPS
    dgates, _ = ops.axis_scale_bwd(x, x, torch.ones(*shape[:2], shape[2] + shape[3]), None, 0)
    lengths = torch.tensor([shape[3]] * shape[2] + [shape[2]] * shape[3])
    assert error(dgates / lengths, exact**2) <= 3 * EPS


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", [3, 7, 14])
@pytest.mark.parametrize("far", [(1,), (2,), (1, 2)], ids=["keys", "values", "both"])
def test_self_attention_far_from_zero(bias, masked, side, far):
    """The gradients of scores are differences of products with values and results, which must not cancel."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, side, side, 3, 2, 8, generator=generator, dtype=torch.float64)
    qkv[:, :, :, far] += 100
    qkv = qkv.float()
    table = torch.randn(2 * side - 1, 2 * side - 1, 2, generator=generator) if bias else None
    mask = torch.rand(2, side, side, generator=generator) > 0.5 if masked else None
    grad = torch.randn(2, side, side, 2, 8, generator=generator)

    def gradients(attention, dtype):
        leaves = [qkv.to(dtype).requires_grad_(), *([table.to(dtype).requires_grad_()] if bias else [])]
        out, _ = attention(leaves[0], leaves[1] if bias else None, mask)
        dqkv, *dtable = torch.autograd.grad(out, leaves, grad.to(dtype))
        return *dqkv.unbind(3), *dtable

    exact = gradients(reference.attention2d, torch.float64)
    eager = gradients(reference.attention2d, torch.float32)
    for fused, plain, truth in zip(gradients(vf.functional.attention2d, torch.float32), eager, exact, strict=True):
        assert error(fused, truth) <= EAGER * error(plain, truth) + UNITS * EPS


@entries
@layouts
def test_float16_is_as_exact_as_its_rounding(entry, layout):
    """Values around 100: sums over pixels are more than float16 holds, 65504. Layers of PyTorch stay in float16."""
    if entry.has_torch_layers or entry.name == "soca":
        pytest.skip("PyTorch's layers are in float16")
    x = catalogue.feature_map((1, 4, 64, 64), layout, torch.float64).add_(100).half()
    fast, plain = entry.pair(4, torch.float16)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, truth = fast(x), plain.double()(exact)
    grad = catalogue.feature_map(tuple(y.shape), layout, torch.float64, seed=1).half()
    dx, dtruth = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(truth, exact, grad.double())[0]
    assert error(y, truth) <= 5e-3
    assert error(dx, dtruth) <= 5e-3


@pytest.mark.parametrize("spread", [0.1, 15, 150, 10_000])
@pytest.mark.parametrize("shape", [(1, 2, 40, 56), (2, 2, 1, 1)])
def test_plain_simam_holds_in_float16(spread, shape):
    x = (catalogue.feature_map(shape, "nchw", torch.float64) * spread).half().requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, truth = reference.simam(x), reference.simam(exact)
    assert error(y, truth) <= 2e-3
    grad = torch.ones_like(y)
    dx, dtruth = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(truth, exact, grad.double())[0]
    assert error(dx, dtruth) <= 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graph_of_simam_has_no_symbolic_maximum(dtype):
    sides = {2: torch.export.Dim("h", min=2, max=64), 3: torch.export.Dim("w", min=2, max=64)}
    x = torch.randn(1, 2, 8, 9).to(dtype)
    program = torch.export.export(reference.SimAM(), (x,), dynamic_shapes=(sides,))
    assert "sym_max" not in str(program.graph)
    other = torch.randn(1, 2, 5, 4).to(dtype)
    torch.testing.assert_close(program.module()(other), reference.simam(other))
