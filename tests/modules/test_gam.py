"""GAM: the published composition of layers, and its two gates, `channel_mlp` and `norm_gate`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import feature_map, layouts, poisoned, targets, value_and_gradients
from visattn_fast import catalogue, reference
from visattn_fast.ops.library import OPS


def test_reference_matches_the_published_composition():
    """Linear layers run over the last axis; convolutions, batch norms and a sigmoid follow each other."""
    gam = reference.GAM(16, rate=4).double()
    channel = nn.Sequential(gam.linear1, nn.ReLU(), gam.linear2)
    spatial = nn.Sequential(gam.conv1, gam.norm1, nn.ReLU(), gam.conv2, gam.norm2)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float64)
    for training in (True, False):
        gam.train(training)
        x1 = x * channel(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(gam(x), x1 * spatial(x1).sigmoid())


@targets
@layouts
@pytest.mark.parametrize("biases", [True, False])
def test_channel_mlp_matches_reference(layout, biases, device, backend):
    """The weights may be those of 1x1 convolutions, without biases, and x may be a slice."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 12, 1, 1), (5,), (12, 5, 1, 1), (12,))
    weights = [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]
    if not biases:
        weights[1] = weights[3] = None
    wide = feature_map((3, 24, 5, 7), layout, torch.float64, device)
    for x in (wide[:, :12], wide[:, 3:15], wide[:, :12, 1:, ::2]):
        tensors = [t if t is None else t.clone().requires_grad_() for t in weights]
        leaf = x.detach().requires_grad_()
        with vf.use_backend(backend), poisoned():
            fused = value_and_gradients(vf.functional.channel_mlp, [leaf, *tensors])
        torch.testing.assert_close(fused, value_and_gradients(reference.channel_mlp, [leaf, *tensors]))
        assert fused[0].is_contiguous(memory_format=catalogue.LAYOUTS[layout])


@targets
@layouts
@pytest.mark.parametrize("training", [True, False])
def test_norm_gate_of_mixed_layouts_and_dtypes_matches_reference(layout, training, device, backend):
    """The result of a convolution may have another layout than x; x may be a slice, and m wider than x."""
    other = "nchw" if layout == "channels_last" else "channels_last"
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.rand(10, generator=generator, dtype=torch.float64).to(device) + 0.5 for _ in range(4)]
    x = feature_map((3, 20, 6, 5), layout, torch.float32, device)[:, :10]
    m = feature_map((3, 10, 6, 5), other, torch.float64, device, seed=2)
    runs = []
    for function, dtype in ((vf.functional.norm_gate, torch.float32), (reference.norm_gate, torch.float64)):
        tensors = [x.to(dtype).requires_grad_(), m.detach().requires_grad_()]
        tensors += [v.clone().requires_grad_() for v in vectors[:2]]
        statistics = [v.clone() for v in vectors[2:]]
        with vf.use_backend(backend):
            run = value_and_gradients(
                lambda *t, f=function, s=statistics: f(*t, *s, training=training, momentum=0.3), tensors
            )
        runs.append([*run, *statistics])
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)
    assert runs[0][0].is_contiguous(memory_format=catalogue.LAYOUTS[layout])


@targets
def test_norm_gate_of_equal_values_is_exact(device, backend):
    """The mean of equal values is exactly their value; a batch norm would magnify an error 300 times."""
    ones, weight = torch.ones(3, 8, 13, 11, device=device), torch.ones(8, device=device)
    for value in (0.1, 1 / 3, 1e4 / 3):
        for layout in catalogue.LAYOUTS.values():
            m = (value * ones).contiguous(memory_format=layout)
            with vf.use_backend(backend):
                y = vf.functional.norm_gate(ones, m, weight, torch.zeros_like(weight))
            assert torch.equal(y, torch.full_like(y, 0.5))


@layouts
@pytest.mark.parametrize("shape", [(2, 16, 5, 3), (0, 16, 5, 3)], ids=["plain", "empty"])
def test_norm_gate_ops_fit_schema_and_reference_in_training(layout, shape):
    """The generic test of op contracts has too few channels for this module."""
    x, m, grad = (feature_map(shape, layout, torch.float32, seed=seed) for seed in range(3))
    weight, bias = torch.rand(16), torch.rand(16)
    ops = torch.ops.visattn_fast
    forward = (x, m, weight, bias, None, None, x, 2, 1e-5)
    _, mean, var = ops.norm_gate_fwd(*forward)
    backward = (grad, x, m, weight, bias, x, mean, var, 2, 1e-5, False)
    for op, arguments in ((ops.norm_gate_fwd.default, forward), (ops.norm_gate_bwd.default, backward)):
        torch.library.opcheck(op, arguments)
        with poisoned():
            kernel = op(*arguments)
        for got, want in zip(kernel, OPS[op._opname].reference(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.stride() == want.stride()
