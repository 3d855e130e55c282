"""The ops behind CBAM and gates of the caller's mathematics: pooling, convolution of maps, scaling, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import visattn_fast as vf
from cases import feature_map, layouts, poisoned, targets
from visattn_fast.ops.library import OPS


@layouts
@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_ops_fit_schema_fake_and_reference(ties, layout):
    """Values and strides equal those of the reference ops; ties of maxima go to the first, or share evenly."""
    x = feature_map((2, 8, 5, 3), layout, torch.float32)
    if ties:
        x = x.relu()
        x[..., ::3] = 0
    grad, residual = (feature_map((2, 8, 5, 3), layout, torch.float32, seed=i) for i in (1, 2))
    generator = torch.Generator().manual_seed(0)
    channel, spatial, dmaps, dpooled, w, q, b, w1, w2 = (
        torch.randn(shape, generator=generator)
        for shape in ((2, 8), (2, 5, 3), (2, 2, 5, 3), (2, 2, 8), (1, 2, 3, 3), (2, 1, 5, 3), (1,), (4, 8), (8, 4))
    )
    calls = [("channel_mean", (x,)), ("map_conv", (dmaps, w)), ("map_conv_bwd", (q, dmaps, w))]
    calls += [("channel_affine", (x, channel, channel.flip(1), *rest)) for rest in ((None, 0), (residual, 2))]
    for bias in (None, b):
        calls += [("spatial_attention_fwd", (x, w, bias)), ("cbam_fwd", (x, w1, w2, w, bias, residual, 1))]
        small = OPS["spatial_attention_fwd"].reference(x, w, bias)
        calls += [("spatial_attention_bwd", (q, x, w, bias, *small))]
        _, *small = OPS["cbam_fwd"].reference(x, w1, w2, w, bias, residual, 1)
        calls += [("cbam_bwd", (grad, x, w1, w2, w, bias, residual, *small, 1))]
    for even in (False, True):
        pooled, at = OPS["pool_pixels"].reference(x, even)
        maps, at_c = OPS["pool_channels"].reference(x, channel, even)
        calls += [
            ("pool_pixels", (x, even)),
            ("pool_channels", (x, channel, even)),
            ("pool_channels_bwd", (x, channel, maps, dmaps, at_c)),
            ("twofold_input_grad", (grad, x, channel, spatial, maps, dmaps, at_c, pooled, dpooled, at)),
        ]
    calls += [("twofold_scale", (x, channel, spatial, residual, 1))]
    calls += [("twofold_scale_bwd", (grad, x, channel, spatial, *rest)) for rest in ((None, 0), (residual, 2))]
    for name, arguments in calls:
        op = getattr(torch.ops.visattn_fast, name).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        with poisoned():
            got = op(*arguments)
        want = OPS[name].reference(*arguments)
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
            assert a.stride() == b.stride(), name


@targets
@pytest.mark.parametrize("k", [1, 3, 7])
def test_convolution_of_maps_matches_pytorch(k, device, backend):
    maps = feature_map((2, 2, 9, 10), "nchw", torch.float64, device).requires_grad_()
    w = feature_map((1, 2, k, k), "nchw", torch.float64, device, seed=1).requires_grad_()
    with vf.use_backend(backend):
        got = vf.functional.conv_maps(maps, w)
    want = F.conv2d(maps, w, padding=k // 2)
    grad = feature_map((2, 1, 9, 10), "nchw", torch.float64, device, seed=2)
    found = [(y, *torch.autograd.grad(y, (maps, w), grad)) for y in (got, want)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"wconv must have shape \[1, 2, k, k\]"):
        vf.functional.conv_maps(maps, w[0])
