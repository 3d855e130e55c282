"""Self-attention over maps: against PyTorch's and timm's, masks, large scores, weights, memory, bad input."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import visattn_fast as vf
from cases import DEVICES, INTERPRETED, TARGETS, feature_map, needs_dtype, poisoned
from outside import library
from visattn_fast import reference
from visattn_fast.measure.memory import peak_bytes
from visattn_fast.ops import self_attention as ops
from visattn_fast.ops.library import OPS
from visattn_fast.reference.self_attention import relative_bias

functional = importlib.import_module("visattn_fast.fused.self_attention")  # not the function of that name
targets = pytest.mark.parametrize(("device", "backend"), [*TARGETS, *((d, "reference") for d in DEVICES)])
native_only = pytest.mark.skipif(INTERPRETED, reason="calls no kernel that other tests do not call")
SIZE, HEADS, D = (3, 5), 2, 8
CASES = list(itertools.product((False, True), repeat=2))  # (with a bias, with a mask)


def tensors(bias, masked, dtype=torch.float32, device="cpu", images=3, size=SIZE, d=D):
    """qkv, a table for larger maps, and a mask that leaves some, none and all of the keys."""
    generator = torch.Generator().manual_seed(0)
    qkv, table = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for s in ((images, *size, 3, HEADS, d), (2 * size[0] + 1, 2 * size[1] + 3, HEADS))
    )
    mask = torch.rand(images, *size, generator=generator) < 0.6
    mask[1], mask[2] = False, True
    return qkv, table if bias else None, mask.to(device) if masked else None


def results(function, qkv, table, mask, **options):
    """The result, the mean weights, and every gradient."""
    out, mean = function(qkv, table, mask, need_weights="mean", **options)
    grad = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.device, out.dtype)
    wanted = [t for t in (qkv, table) if t is not None]
    return out.detach(), mean, *torch.autograd.grad(out, wanted, grad)


@targets
@pytest.mark.parametrize(("bias", "masked"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_against_float64(dtype, bias, masked, device, backend):
    """Errs at most twice as much as the reference in its dtype, and a rounding band; again, the same bits."""
    needs_dtype(backend, device, dtype)
    inputs = tensors(bias, masked, dtype, device)
    exact = results(
        reference.attention2d, *(t.double() if t is not None and t.is_floating_point() else t for t in inputs)
    )
    eager = results(reference.attention2d, *inputs)
    with vf.use_backend(backend), poisoned():
        found = results(vf.functional.attention2d, *inputs)
        again = results(vf.functional.attention2d, *inputs) if dtype == torch.float32 else found
    for got, twin, plain, want in zip(found, again, eager, exact, strict=True):
        assert torch.equal(got, twin)
        assert got.dtype == dtype
        error, allowed = ((t.double() - want).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * want.abs().max()


@targets
def test_agrees_with_pytorch(device, backend):
    """`scaled_dot_product_attention` with the bias expanded; a map smaller than the table's takes its middle."""
    qkv, table, _ = tensors(True, False, torch.float64, device)
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
    bias = torch.stack([  # [L, L, heads]
        torch.stack([table[yi - yj + SIZE[0], xi - xj + SIZE[1] + 1] for yj in range(SIZE[0]) for xj in range(SIZE[1])])
        for yi in range(SIZE[0]) for xi in range(SIZE[1])
    ])  # fmt: skip
    torch.testing.assert_close(relative_bias(table, *SIZE), bias.permute(2, 0, 1), rtol=0, atol=0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.permute(2, 0, 1)[None], scale=0.3)
    with vf.use_backend(backend):
        found, _ = vf.functional.attention2d(qkv, table, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2).unflatten(1, SIZE))


@native_only
@pytest.mark.parametrize(("bias", "masked"), CASES)
def test_where_no_kernel_serves(bias, masked):
    """float16 on CPUs is PyTorch's operations in blocks; on other devices its function serves, the bias expanded."""
    inputs = tensors(bias, masked, torch.float16)
    exact = results(
        reference.attention2d, *(None if t is None else t.double() if t.requires_grad else t for t in inputs)
    )
    for got, want in zip(results(vf.functional.attention2d, *inputs), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=5e-3, atol=5e-3)
    out = functional._scaled_dot_product(
        *(None if t is None else t.detach().float() for t in inputs[:2]), inputs[2], D**-0.5
    )
    torch.testing.assert_close(out.double(), exact[0], rtol=5e-3, atol=5e-3)


@targets
@pytest.mark.parametrize("bias", [False, True])
def test_what_a_mask_shuts_out(bias, device, backend):
    """NaN in keys and values there reaches nothing, and their gradients are zero; without keys all is zero."""
    qkv, table, mask = tensors(bias, True, torch.float32, device)
    dirty = qkv.detach().clone()
    dirty[:, :, :, 1:].masked_fill_(~mask[..., None, None, None], torch.nan)
    with vf.use_backend(backend):
        found = results(vf.functional.attention2d, dirty.requires_grad_(), table, mask)
        clean = results(vf.functional.attention2d, qkv, table, mask)
    torch.testing.assert_close(found, clean)
    out, mean, dqkv, *_ = found
    assert not out[1].any()
    assert not mean[1].any()
    assert not dqkv[1].any()
    assert not dqkv[:, :, :, 1:][~mask].any()


@targets
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_scores(bias, dtype, device, backend):
    """Scores in the thousands: a weight is one or nothing, nothing overflows, gradients are finite."""
    needs_dtype(backend, device, dtype)
    qkv, table, _ = tensors(bias, False, dtype, device)
    qkv = (qkv.detach() * torch.tensor([100.0, 100.0, 1.0], dtype=dtype, device=device)[:, None, None]).requires_grad_()
    exact = results(reference.attention2d, qkv.double(), None if table is None else table.double(), None)
    with vf.use_backend(backend):
        found = results(vf.functional.attention2d, qkv, table, None)
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.02, atol=0.02)


@targets
@pytest.mark.parametrize("size", [SIZE, (6, 5)])  # fewer keys than a vector has, and more
def test_nan_stays(size, device, backend):
    """A NaN in a query is its own; one in a key is its image's; one in a value comes out in its channel."""
    for part, wrong in ((0, 1), (1, size[0] * size[1]), (2, size[0] * size[1])):
        qkv = tensors(False, False, device=device, size=size)[0].detach().clone()
        qkv[0, 2, 3, part, 1, 4] = torch.nan
        with vf.use_backend(backend):
            out, _ = vf.functional.attention2d(qkv)
        assert out.isnan().any(4).sum((1, 2)).tolist() == [[0, wrong], [0, 0], [0, 0]]


@native_only
@pytest.mark.parametrize(("bias", "masked"), CASES)
def test_blocks(bias, masked, monkeypatch):
    """Blocks of one row, of several, and of single images give what the formula gives."""
    inputs = tensors(bias, masked, torch.float64)
    expected = results(reference.attention2d, *inputs)
    for limit in (1, 700, 1500, 4000):
        monkeypatch.setattr(ops, "_BLOCK", limit)
        with vf.use_backend("auto"):
            torch.testing.assert_close(results(vf.functional.attention2d, *inputs), expected)


@native_only
@pytest.mark.parametrize(("bias", "masked"), CASES)
def test_gradcheck(bias, masked):
    qkv, table, mask = tensors(bias, masked, torch.float64, size=(2, 3), d=2)
    inputs = (qkv, table) if bias else (qkv,)
    for function in (vf.functional.attention2d, reference.attention2d):

        def call(qkv, table=None, function=function):
            return function(qkv, table, mask)[0]

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@targets
@pytest.mark.parametrize(("bias", "masked"), CASES)
@pytest.mark.parametrize("images", [0, 3])
def test_opcheck(images, bias, masked, device, backend):
    """Fakes, and every kernel against the reference op, the mean included."""
    if backend == "reference":
        pytest.skip("is no op")
    qkv, table, mask = (None if t is None else t.detach() for t in tensors(bias, masked, device=device))
    qkv, mask = qkv[:images], None if mask is None else mask[:images]
    with vf.use_backend(backend):
        out, lse = torch.ops.visattn_fast.attention_fwd(qkv, table, mask, 0.4)
        calls = {
            "attention_fwd": (qkv, table, mask, 0.4),
            "attention_bwd": (out.cos(), qkv, table, mask, out, lse, 0.4),
            "attention_mean": (qkv, table, mask, lse, 0.4),
        }
        for name, args in calls.items():
            op = getattr(torch.ops.visattn_fast, name).default
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
            with poisoned():
                found, expected = (f(*args) for f in (op, OPS[name].reference))
            for got, want in zip(*map(tree_leaves, (found, expected)), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                assert got.stride() == want.stride()


def test_weights():
    """The mean is that of all weights, which have gradients; both sum to 1, in the fused and the reference module."""
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


def build(**options):
    """A fused and a reference module with equal weights."""
    torch.manual_seed(0)
    fast = vf.FastSelfAttention2d(16, HEADS, **options)
    plain = reference.SelfAttention2d(16, HEADS, **options)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


@native_only
@pytest.mark.parametrize("position_bias", [None, (64, 64)])
def test_memory(position_bias):
    """4096 positions, forward and backward: far less than one map of weights in all that is held at a time."""
    fast = vf.FastSelfAttention2d(32, 1, position_bias=position_bias)
    x = torch.randn(1, 32, 64, 64, requires_grad=True)
    peak = peak_bytes(lambda: fast(x).sum().backward(), x.device)
    assert 0 < peak < (16 << 20) + 20 * x.nbytes
    assert peak < 4096 * 4096 * 4 / 2


@native_only
def test_attention_memory():
    """The heat map of 4096 positions, too."""
    fast = vf.FastSelfAttention2d(32, 1)
    x = torch.randn(1, 32, 64, 64)
    with torch.no_grad():
        assert peak_bytes(lambda: fast.attention(x), x.device) < (8 << 20) + 10 * x.nbytes


def multihead(module, x, key_mask=None):
    padding = None if key_mask is None else ~key_mask.flatten(1)
    tokens = x.flatten(2).mT
    return module(tokens, tokens, tokens, key_padding_mask=padding)[0].mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("cls", [reference.SelfAttention2d, vf.FastSelfAttention2d])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_both_ways(bias, cls):
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


@native_only
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"attn_head_dim": 6, "proj_bias": False}], ids=str)
def test_timm_both_ways(options):
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
def test_multihead_refused(options, message):
    with pytest.raises(ValueError, match=f"attention has no equivalent here: {message}$"):
        reference.SelfAttention2d.from_multihead(nn.MultiheadAttention(16, HEADS, **options))


@native_only
@pytest.mark.parametrize("position_bias", [None, SIZE])
def test_export(position_bias):
    """torch.export, with a mask and any batch."""
    fast = build(position_bias=position_bias)[0].eval()
    x, mask = torch.randn(2, 16, *SIZE), torch.rand(2, *SIZE) < 0.7
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fast, (x, mask), dynamic_shapes=({0: batch}, {0: batch}, None)[:2])
    x, mask = torch.randn(5, 16, *SIZE), torch.rand(5, *SIZE) < 0.7
    torch.testing.assert_close(program.module()(x, mask), fast(x, mask))


@native_only
def test_compile_with_mask():
    """One graph with mask, bias and mean weights, gradients included."""
    torch._dynamo.reset()
    fast = build(position_bias=SIZE)[0]
    x, mask = torch.randn(2, 16, *SIZE, requires_grad=True), torch.rand(2, *SIZE) < 0.7
    found = []
    for call in (torch.compile(fast, fullgraph=True, backend="aot_eager"), fast):
        y, mean = call(x, mask, "mean")
        found.append((y, mean, *torch.autograd.grad(y.square().sum(), [x, *fast.parameters()])))
    torch.testing.assert_close(*found)


X, QKV = torch.randn(2, 16, *SIZE), torch.randn(2, *SIZE, 3, HEADS, D)
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
def test_bad_calls(call, error, message, which):
    with pytest.raises(error, match=message):
        call(build(position_bias=SIZE)[which])


@pytest.mark.parametrize("function", [vf.functional.attention2d, reference.attention2d])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((QKV[0],), ValueError, r"qkv must have shape \[N, H, W, 3, heads, d\], got \[3, 5, 3, 2, 8\]"),
        ((QKV[:, :, :, :2],), ValueError, r"qkv must have shape \[N, H, W, 3, heads, d\]"),
        ((QKV.long(),), TypeError, "qkv must have a floating-point dtype, got torch.int64"),
        ((QKV, torch.ones(6, 9, 2)), ValueError, r"table must have shape \[2H - 1, 2W - 1, heads\], got \[6, 9, 2\]"),
        ((QKV, torch.ones(5, 9, 3)), ValueError, r"table must have shape \[5, 9, 2\], got \[5, 9, 3\]"),
    ],
)
def test_bad_arguments(args, error, message, function):
    with pytest.raises(error, match=message):
        function(*args)


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
def test_bad_construction(args, message, cls):
    with pytest.raises(ValueError, match=message):
        cls(*args)
