"""Bad input raises one clear error, the same from the fused and the reference classes and functions."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import entries
from visattn_fast import reference

X = torch.randn(2, 32, 4, 4)
BAD_CALLS = {
    "rank": (lambda m: m(X[0, 0]), ValueError, r"x must have shape \[N, C, H, W\], got 2 dimensions: \(4, 4\)"),
    "channels": (lambda m: m(X[:, :8]), ValueError, r"x must have 32 channels, .*got shape \(2, 8, 4, 4\)"),
    "integer": (lambda m: m(X.long()), TypeError, r"x must have a floating-point dtype, got torch.int64"),
    "complex": (lambda m: m(X.to(torch.cfloat)), TypeError, r"x must have a floating-point dtype, got torch.complex64"),
    "list": (lambda m: m([1.0]), TypeError, r"x must be a torch.Tensor, got list"),
    "no pixels": (
        lambda m: m(X[..., :0]),
        ValueError,
        r"at least one channel and one pixel, got shape \(2, 32, 4, 0\)",
    ),
    "device": (lambda m: m.to("meta")(X), ValueError, r"must be on the device of x, cpu, got meta"),
}
BAD_ARGUMENTS = [
    (lambda r: r.SE(8), r"channels must be at least reduction=16, got 8"),
    (lambda r: r.SE(0), r"channels must be a positive int, got 0"),
    (lambda r: r.SE(32, reduction=-1), r"reduction must be a positive int, got -1"),
    (lambda r: r.SE(32.0), r"channels must be a positive int, got 32.0"),
    (lambda r: r.scSE(8), r"channels must be at least reduction=16, got 8"),
    (lambda r: r.LocalAttention(4), r"channels must be at least reduction=8, got 4"),
    (lambda r: r.ECA(0), r"channels must be a positive int, got 0"),
    (lambda r: r.ECA(8, gamma=0), r"gamma must be a positive int, got 0"),
    (lambda r: r.ECA(8, kernel_size=4), r"kernel_size must be odd, .*got 4"),
    (lambda r: r.ECA(8, kernel_size=-3), r"kernel_size must be a positive int, got -3"),
    (lambda r: r.SK(0), r"channels must be a positive int, got 0"),
    (lambda r: r.SK(32, reduction=0), r"reduction must be a positive int, got 0"),
    (lambda r: r.SK(32, min_width=0), r"min_width must be a positive int, got 0"),
    (lambda r: r.SK(32, groups=5), r"channels must be a multiple of groups=5, got 32"),
    (lambda r: r.ChannelAttention(4), r"channels must be at least reduction=8, got 4"),
    (lambda r: r.SpatialAttention(4), r"kernel_size must be 3 or 7, got 4"),
    (lambda r: r.S2MLPv2(0), r"channels must be a positive int, got 0"),
    (lambda r: r.SOCA(4), r"channels must be at least reduction=8, got 4"),
    (lambda r: r.WindowAttention2d(32, 7, 5), r"channels must be a multiple of heads=5, got 32"),
    (lambda r: r.WindowAttention2d(32, 0, 4), r"window must be a positive int, got 0"),
    (lambda r: r.WindowAttention2d(32, (7, 7, 7), 4), r"window must be one int or two, .*got \(7, 7, 7\)"),
    (lambda r: r.WindowAttention2d(32, 7, 4, shift=7), r"shift must be ints from 0 to less than the window, .*got"),
    (lambda r: r.WindowAttention2d(32, 7, 4, layout="nlc"), r"layout must be one of \('nchw', 'nhwc'\), got 'nlc'"),
    (lambda r: r.WindowAttention2d(32, 7, 4, attn_drop=0.1), r"attn_drop must be 0: .*got 0\.1"),
    (lambda r: r.CrissCross(4), r"channels must be at least reduction=8, got 4"),
    (lambda r: r.CBAM(32, kernel_size=5), r"kernel_size must be 3 or 7, got 5"),
    (lambda r: r.ShuffleAttention(24), r"channels must be a multiple of 2 \* groups = 16, got 24"),
    (lambda r: r.GAM(0), r"in_channels must be a positive int, got 0"),
    (lambda r: r.GAM(32, rate=0), r"rate must be a positive int, got 0"),
    (lambda r: r.GAM(3), r"in_channels must be at least rate=4, got 3"),
    (lambda r: r.GAM(32, 64), r"out_channels must be in_channels=32 or None: .*, got 64"),
    (lambda r: r.NAM(0), r"channels must be a positive int, got 0"),
    (lambda r: r.SimAM(0), r"e_lambda must be a positive number, got 0"),
    (lambda r: r.SimAM("a"), r"e_lambda must be a positive number, got 'a'"),
]


@entries
@pytest.mark.parametrize("which", [0, 1], ids=["fast", "reference"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_map_raises(entry, which, name):
    call, error, message = BAD_CALLS[name]
    module = entry.pair(32)[which]
    if name == "channels" and (not entry.arguments(32) or entry.name == "eca"):
        pytest.skip("takes any number of channels")
    if name == "device" and not list(module.parameters()):
        pytest.skip("has no parameters on another device")
    with pytest.raises(error, match=message):
        call(module)


class _Fast:
    """The fused classes by the names of the reference classes."""

    def __getattr__(self, name):
        return getattr(vf, f"Fast{name}")


@pytest.mark.parametrize("classes", [_Fast(), reference], ids=["fast", "reference"])
@pytest.mark.parametrize(("construct", "message"), BAD_ARGUMENTS)
def test_bad_constructor_argument_raises(classes, construct, message):
    with pytest.raises(ValueError, match=message):
        construct(classes)


BAD_WEIGHTS = [
    (
        lambda f: f.se(X, torch.ones(4, 32), None, torch.ones(32, 5), None),
        r"w2 must have shape \[32, 4\], got \[32, 5\]",
    ),
    (lambda f: f.se(X, torch.ones(4), None, torch.ones(32, 4), None), r"w1 must have shape \[R, C\] .*got \[4\]"),
    (
        lambda f: f.se(X, torch.ones(4, 32), torch.ones(5), torch.ones(32, 4), None),
        r"b1 must have shape \[4\], got \[5\]",
    ),
    (
        lambda f: f.scse(X, torch.ones(4, 32), None, torch.ones(32, 4), None, torch.ones(2, 32), None),
        r"ws must have shape \[1, 32\], got \[2, 32\]",
    ),
    (
        lambda f: f.scse(X, torch.ones(4, 32), None, torch.ones(32, 4), None, torch.ones(1, 32), torch.ones(2)),
        r"bs must have shape \[1\], got \[2\]",
    ),
    (
        lambda f: f.local_attention(
            X, torch.ones(4, 32), None, torch.ones(32, 4), None, torch.ones(4, 32), None, torch.ones(1, 5), None
        ),
        r"p2 must have shape \[1, 4\], got \[1, 5\]",
    ),
    (
        lambda f: f.channel_attention(X, torch.ones(4, 32, 3, 3), torch.ones(32, 4, 1, 1)),
        r"w1 must have shape \[4, 32\], got \[4, 32, 3, 3\]",
    ),
    (
        lambda f: f.channel_mlp(X, torch.ones(4, 32), None, torch.ones(32, 5), None),
        r"w2 must have shape \[32, 4\], got \[32, 5\]",
    ),
    (
        lambda f: f.norm_gate(X, X[:1], torch.ones(32), torch.ones(32)),
        r"m must have the shape of x, \(2, 32, 4, 4\), got \(1, 32, 4, 4\)",
    ),
    (lambda f: f.norm_gate(X, X, torch.ones(31), torch.ones(32)), r"weight must have shape \[32\], got \[31\]"),
    (lambda f: f.nam(X, torch.ones(31), torch.ones(32)), r"weight must have shape \[32\], got \[31\]"),
    (lambda f: f.nam(X[:1, :, :1, :1], torch.ones(32), torch.ones(32)), r"expected more than 1 value per channel"),
    (lambda f: f.nam(X, torch.ones(32), torch.ones(32), training=False), r"running_mean and running_var must be given"),
    (lambda f: f.shuffle_attention(X, *[torch.ones(3)] * 6), r"x must have a multiple of 6 channels, .*got \(2, 32, "),
    (lambda f: f.simam(X, float("nan")), r"e_lambda must be a positive number, got nan"),
    (
        lambda f: f.split_attention(X, torch.ones(8, 8), torch.ones(24, 8)),
        r"three branches .*got shape \(2, 32, 4, 4\)",
    ),
    (
        lambda f: f.split_attention(X[:, :30], torch.ones(10, 10), torch.ones(10, 10)),
        r"w2 must have shape \[30, 10\], got \[10, 10\]",
    ),
    (
        lambda f: f.window_attention(X, None, torch.ones(169, 2), 2, 7),
        r"qkv must have a multiple of 3 \* heads = 6 channels, got \[2, 32, 4, 4\]",
    ),
    (
        lambda f: f.window_attention(X[..., :3], None, torch.ones(168, 1), 1, 7),
        r"table must have shape \[169, 1\], got \[168, 1\]",
    ),
    (
        lambda f: f.window_attention(X[..., :3], torch.ones(1), torch.ones(169, 1), 1, 7),
        r"bias must have shape \[3\], got \[1\]",
    ),
    (lambda f: f.eca(X, torch.ones(1, 1, 4)), r"kernel size of weight must be odd, .*got 4"),
    (lambda f: f.eca(X, torch.ones(3)), r"weight must have shape \[1, 1, k\], got \[3\]"),
    (lambda f: f.spatial_attention(X, torch.ones(1, 2, 4, 4)), r"kernel size of wconv must be odd, .*got 4"),
    (
        lambda f: f.spatial_attention(X, torch.ones(1, 3, 7, 7)),
        r"wconv must have shape \[1, 2, 7, 7\], got \[1, 3, 7, 7\]",
    ),
    (
        lambda f: f.spatial_attention(X, torch.ones(1, 2, 3, 7)),
        r"wconv must have shape \[1, 2, 7, 7\], got \[1, 2, 3, 7\]",
    ),
    (
        lambda f: f.spatial_attention(X, torch.ones(1, 2, 7, 7), bias=torch.ones(2)),
        r"bias must have shape \[1\], got \[2\]",
    ),
    (
        lambda f: f.cbam(
            X, torch.ones(4, 32), torch.ones(32, 4), torch.ones(1, 2, 7, 7), bias=torch.ones(1, device="meta")
        ),
        r"bias must be on the device of x, cpu, got meta",
    ),
]


@pytest.mark.parametrize("functions", [vf.functional, reference], ids=["fast", "reference"])
@pytest.mark.parametrize(("call", "message"), BAD_WEIGHTS)
def test_bad_argument_of_a_function_raises(functions, call, message):
    with pytest.raises(ValueError, match=message):
        call(functions)
