"""SelfAttention2d as a module: weights, PyTorch's and timm's parameters, memory, torch.compile, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import feature_map
from outside import library
from visattn_fast import reference
from visattn_fast.measure.memory import peak_bytes

SIZE, HEADS = (3, 5), 2


def build(**options):
    """Builds a fused and a reference module with equal weights."""
    torch.manual_seed(0)
    fast = vf.FastSelfAttention2d(16, HEADS, **options)
    plain = reference.SelfAttention2d(16, HEADS, **options)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def test_weights_sum_to_one_and_have_the_returned_mean():
    """The full weights carry gradients, and their mean is the attention map, in both classes."""
    _, plain = build(position_bias=SIZE)
    x = feature_map((2, 16, *SIZE), "nchw", torch.float32).requires_grad_()
    for module in build(position_bias=SIZE):
        y, mean = module(x, need_weights="mean")
        same, full = module(x, need_weights="full")
        torch.testing.assert_close(y, same)
        torch.testing.assert_close(mean, full.mean(2).unflatten(2, SIZE))
        torch.testing.assert_close(full.sum(3), torch.ones(2, HEADS, SIZE[0] * SIZE[1]))
        torch.testing.assert_close(module.attention(x)["received"], mean)
        assert full.requires_grad
        assert not mean.requires_grad
        torch.testing.assert_close(y, plain(x))


@pytest.mark.parametrize("position_bias", [None, (64, 64)])
def test_training_holds_no_map_of_weights(position_bias):
    """The peak of a step over 4096 positions is below half a map of weights."""
    fast = vf.FastSelfAttention2d(32, 1, position_bias=position_bias)
    x = torch.randn(1, 32, 64, 64, requires_grad=True)
    peak = peak_bytes(lambda: fast(x).sum().backward(), x.device)
    assert 0 < peak < (16 << 20) + 20 * x.nbytes
    assert peak < 4096 * 4096 * 4 / 2


def test_attention_map_needs_no_map_of_weights():
    fast = vf.FastSelfAttention2d(32, 1)
    x = torch.randn(1, 32, 64, 64)
    with torch.no_grad():
        assert peak_bytes(lambda: fast.attention(x), x.device) < (8 << 20) + 10 * x.nbytes


def multihead(module, x, key_mask=None):
    """Applies an `nn.MultiheadAttention` to a map."""
    padding = None if key_mask is None else ~key_mask.flatten(1)
    tokens = x.flatten(2).mT
    return module(tokens, tokens, tokens, key_padding_mask=padding)[0].mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("cls", [reference.SelfAttention2d, vf.FastSelfAttention2d])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_converts_both_ways(bias, cls):
    theirs = nn.MultiheadAttention(16, HEADS, bias=bias, batch_first=True).double().eval()
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    ours = cls.from_multihead(theirs)
    assert type(ours) is cls
    assert not ours.training
    x, mask = feature_map((2, 16, *SIZE), "channels_last", torch.float64), torch.rand(2, *SIZE) < 0.7
    for key_mask in (None, mask):
        expected = multihead(theirs, x, key_mask)
        torch.testing.assert_close(ours(x, key_mask), expected)
        torch.testing.assert_close(multihead(ours.to_multihead(), x, key_mask), expected)
    assert cls.from_multihead(theirs, residual=True)(x).allclose(ours(x) + x)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"attn_head_dim": 6, "proj_bias": False}], ids=str)
def test_timm_attention_converts_both_ways(options):
    attention = library("timm.layers").Attention
    torch.manual_seed(0)
    theirs, other = (attention(16, HEADS, **options).train(False) for _ in range(2))
    ours = vf.FastSelfAttention2d.from_timm(theirs)
    x = feature_map((2, 16, *SIZE), "channels_last", torch.float32)
    expected = theirs(x.permute(0, 2, 3, 1).flatten(1, 2)).mT.unflatten(2, SIZE)
    torch.testing.assert_close(ours(x), expected)
    assert ours.to_timm(other) is other
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in other.state_dict().items())
    with pytest.raises(ValueError, match=r"attention has no equivalent here: attn_drop, q_norm, k_norm$"):
        vf.FastSelfAttention2d.from_timm(attention(16, HEADS, attn_drop=0.1, qk_norm=True, norm_layer=nn.LayerNorm))
    with pytest.raises(ValueError, match="the module has no equivalent here: position_bias, residual"):
        build(position_bias=SIZE, residual=True)[0].to_timm(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"kdim": 8}, "kdim or vdim other than embed_dim"),
        ({"add_bias_kv": True, "add_zero_attn": True}, "add_bias_kv, add_zero_attn"),
    ],
)
def test_multihead_attention_without_equivalent_raises(options, message):
    with pytest.raises(ValueError, match=f"attention has no equivalent here: {message}$"):
        reference.SelfAttention2d.from_multihead(nn.MultiheadAttention(16, HEADS, **options))


def test_compiled_module_with_a_mask_matches_eager():
    """Mask, bias and mean weights are in one graph, gradients included."""
    torch._dynamo.reset()
    fast = build(position_bias=SIZE)[0]
    x, mask = torch.randn(2, 16, *SIZE, requires_grad=True), torch.rand(2, *SIZE) < 0.7
    found = []
    for call in (torch.compile(fast, fullgraph=True, backend="aot_eager"), fast):
        y, mean = call(x, mask, "mean")
        found.append((y, mean, *torch.autograd.grad(y.square().sum(), [x, *fast.parameters()])))
    torch.testing.assert_close(*found)


X = torch.randn(2, 16, *SIZE)
BAD_CALLS = [
    (lambda m: m(X, torch.ones(2, *SIZE)), TypeError, "key_mask must be a bool tensor, .*got torch.float32"),
    (lambda m: m(X, [True]), TypeError, "key_mask must be a bool tensor, .*got list"),
    (lambda m: m(X, torch.ones(2, 5, 3) > 0), ValueError, r"key_mask must have shape \[2, 3, 5\], got \[2, 5, 3\]"),
    (lambda m: m(X, torch.ones(2, *SIZE, device="meta") > 0), ValueError, "key_mask must be on the device of x, cpu"),
    (lambda m: m(X, None, "all"), ValueError, r"need_weights must be one of .*got 'all'"),
    (
        lambda m: m(X.repeat(1, 1, 2, 1)),
        ValueError,
        "the position bias is for maps of up to 3 x 5 positions, got 6 x 5",
    ),
]


@pytest.mark.parametrize("which", [0, 1], ids=["fast", "reference"])
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_call_raises(call, error, message, which):
    with pytest.raises(error, match=message):
        call(build(position_bias=SIZE)[which])


@pytest.mark.parametrize("cls", [reference.SelfAttention2d, vf.FastSelfAttention2d])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((16, 3), "channels must be a multiple of heads=3 unless head_dim is given, got 16"),
        ((16, 0), "heads must be a positive int, got 0"),
        ((16, 2, 0), "head_dim must be a positive int, got 0"),
        ((16, 2, 8, True, True, 7), r"position_bias must be \(H, W\) or None, got 7"),
        ((16, 2, 8, True, True, (7, -1)), "position_bias must be a positive int, got -1"),
    ],
)
def test_bad_constructor_argument_raises(args, message, cls):
    with pytest.raises(ValueError, match=message):
        cls(*args)
