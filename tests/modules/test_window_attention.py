"""Attention inside windows: odd maps and windows, strides, threads, maps of weights; timm's and torchvision's."""

from __future__ import annotations

import sys

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED, TARGETS, feature_map, poisoned, run
from outside import library
from visattn_fast import catalogue, ops, reference
from visattn_fast.ops.library import OPS

targets = pytest.mark.parametrize(("device", "backend"), TARGETS)
others = pytest.mark.skipif(INTERPRETED, reason="held against the reference, as the parity tests do in the interpreter")
quiet = pytest.mark.filterwarnings("ignore")  # the libraries' own

# window, shift, pad_first, [N, H, W], heads, C: whole windows, padding, seams within padding, long and small windows
GEOMETRIES = [
    ((7, 7), (3, 3), False, (1, 13, 9), 1, 16),
    ((2, 3), (1, 2), False, (1, 5, 7), 1, 3),
    ((7, 7), (3, 3), True, (1, 3, 5), 2, 40),  # one window, shifted all the same
    ((4, 4), (2, 2), True, (0, 6, 6), 2, 16),
]
GEOMETRIES += (
    [((9, 9), (4, 0), True, (1, 10, 9), 1, 16)]  # more than one tile of queries
    if INTERPRETED
    else [
        ((7, 7), (3, 3), True, (2, 14, 14), 2, 16),
        ((7, 7), (3, 3), True, (1, 13, 9), 2, 16),
        ((7, 7), (0, 3), False, (1, 8, 15), 1, 16),
        ((8, 4), (5, 1), True, (1, 9, 10), 3, 24),
        ((16, 16), (8, 8), True, (1, 17, 16), 1, 32),
    ]
)


def tensors(shape, heads, channels, window, device="cpu", dtype=torch.float32):
    """qkv ``[N, H, W, 3C]``, its bias and table, so large that the softmax is far from even."""
    sizes = ((*shape, 3 * channels), (3 * channels,), ((2 * window[0] - 1) * (2 * window[1] - 1), heads))
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return [t.to(device, dtype).requires_grad_() for t in made]


def gradients(function, inputs, *arguments):
    """The result and the gradients of all inputs, which are leaves."""
    y = function(*inputs, *arguments)
    grad = catalogue.feature_map(tuple(y.shape), dtype=torch.float64, seed=1).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t is not None], grad)]


def exact(inputs, *arguments):
    """The reference's results in float64."""
    return gradients(
        reference.window_attention, [t if t is None else leaf(t, torch.float64) for t in inputs], *arguments
    )


def leaf(t, dtype):
    return t.detach().to(dtype).requires_grad_()


def assert_near(got, want, tolerance):
    """Each within ``tolerance`` of the largest value that is to be there."""
    for found, expected in zip(got, want, strict=True):
        allowed = 1e-30 + (tolerance * expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


@targets
@pytest.mark.parametrize(("window", "shift", "pad_first", "shape", "heads", "channels"), GEOMETRIES, ids=str)
def test_geometries(window, shift, pad_first, shape, heads, channels, device, backend):
    inputs = tensors(shape, heads, channels, window, device)
    for given in (inputs, [inputs[0], None, inputs[2]])[: 1 if INTERPRETED else 2]:
        arguments = (heads, window, shift, None, pad_first)
        with vf.use_backend(backend), poisoned():
            got = gradients(vf.functional.window_attention, given, *arguments)
        assert_near(got, exact(given, *arguments), 4e-6)


@targets
def test_other_strides_and_dtypes(device, backend):
    """Slices, transposed and expanded tensors; bias and table in other dtypes than qkv; a scale; a strided gradient."""
    qkv, bias, table = (t.detach() for t in tensors((2, 9, 8), 2, 16, (4, 4), device))
    wide = torch.cat([qkv, qkv], 3)
    views = (wide[..., :48], qkv.transpose(1, 2).contiguous().transpose(1, 2), qkv[:1].expand_as(qkv))
    for view in views[: 1 if INTERPRETED else 3]:
        inputs = [view.requires_grad_(), leaf(bias, torch.bfloat16), leaf(table, torch.float64)]
        with vf.use_backend(backend), poisoned():
            y = vf.functional.window_attention(*inputs, 2, 4, 2, 0.7)
            grad = feature_map(tuple(y.shape), "channels_last", torch.float32, device)
            got = torch.autograd.grad(y, inputs, grad)
        doubles = [leaf(t, torch.float64) for t in inputs]
        want = reference.window_attention(*doubles, 2, 4, 2, 0.7)
        assert [g.dtype for g in got] == [t.dtype for t in inputs]
        assert_near([y], [want], 4e-6)
        assert_near(got, torch.autograd.grad(want, doubles, grad.double()), 5e-3)


@targets
def test_large_logits(device, backend, monkeypatch):
    """Nothing overflows, and the 100 of a seam are no infinity: where logits are larger, it is seen across."""
    inputs = tensors((1, 8, 8), 1, 16, (4, 4), device)
    with torch.no_grad():
        inputs[0][..., :32] *= 6
    want = exact(inputs, 1, 4, 2)
    with vf.use_backend(backend):
        assert_near(gradients(vf.functional.window_attention, inputs, 1, 4, 2), want, 1e-4)
    monkeypatch.setattr(sys.modules[reference.window_attention.__module__], "APART", -torch.inf)
    assert not torch.allclose(exact(inputs, 1, 4, 2)[0], want[0], atol=0.1)


@targets
def test_threads_and_repetition(device, backend):
    """The same bits every time, with any number of threads, of the table's gradient too."""
    inputs = tensors((1, 9, 7) if INTERPRETED else (2, 19, 22), 2, 16, (4, 5), device)
    before, runs = torch.get_num_threads(), []
    for threads in (before, *((1, 2, 3) if backend == "cpp" else (before,))):
        torch.set_num_threads(threads)
        try:
            with vf.use_backend(backend), poisoned():
                runs.append(gradients(vf.functional.window_attention, inputs, 2, (4, 5), (2, 2)))
        finally:
            torch.set_num_threads(before)
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@targets
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_op(dtype, device, backend):
    """Schema and fake, with padding and without; values of the kernel beside the plain op's."""
    fused = torch.ops.visattn_fast
    for shape, biased in (((1, 6, 5), True), ((1, 4, 4), False)):
        qkv, bias, table = (t.detach() for t in tensors(shape, 2, 16, (4, 4), device, dtype))
        options = (bias if biased else None, table, 2, 4, 4, 1, 2, 0.35, 1)
        grad = feature_map((*shape, 16), "nchw", dtype, device)
        for op, arguments in (
            (fused.window_attention_fwd.default, (qkv, *options)),
            (fused.window_attention_bwd.default, (grad, qkv, *options)),
        ):
            with vf.use_backend(backend):
                torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
                got = op(*arguments)
            tuples = [r if isinstance(r, tuple) else (r,) for r in (got, OPS[op._opname].reference(*arguments))]
            for found, plain in zip(*tuples, strict=True):
                assert (found.dtype, found.stride()) == (plain.dtype, plain.stride())
                tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)


@others
def test_gradcheck():
    """Both orders, where a map is padded, shifted and cut by seams."""
    for pad_first in (True, False):
        inputs = [leaf(t, torch.float64) for t in tensors((1, 3, 4), 2, 2, (2, 3))]
        arguments = (2, (2, 3), (1, 1), None, pad_first)
        for function in (reference.window_attention, vf.functional.window_attention):
            assert torch.autograd.gradcheck(lambda *t, f=function, a=arguments: f(*t, *a), inputs)
            assert torch.autograd.gradgradcheck(lambda *t, f=function, a=arguments: f(*t, *a), inputs, fast_mode=True)


@others
@quiet
@pytest.mark.parametrize("size", [(14, 14), (9, 16), (5, 6)], ids=str)
def test_timm(size):
    """A block of timm's: the same weights, by the same names, both ways."""
    swin = library("timm.models.swin_transformer")
    for shift in (0, 3):
        block = swin.SwinTransformerBlock(32, size, 2, window_size=7, shift_size=shift).double()
        window = block.window_size
        for kind in (reference.WindowAttention2d, vf.FastWindowAttention2d):
            ours = kind(32, window, 2, min(shift, *window), layout="nhwc", pad_first=False).double()
            ours.load_state_dict(block.attn.state_dict())
            block.attn.load_state_dict(ours.state_dict())
            x = feature_map((2, *size, 32), "nchw", torch.float64)
            parameters = dict(block.attn.named_parameters())
            want = gradients(lambda x, *_, b=block: b._attn(x), [leaf(x, x.dtype), *parameters.values()])
            got = run(ours, x)
            for name, expected in zip(("y", "x", *parameters), want, strict=True):
                torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-10)


@others
@quiet
@pytest.mark.parametrize("size", [(14, 14), (9, 16), (5, 6)], ids=str)
def test_torchvision(size):
    other = library("torchvision.models.swin_transformer").ShiftedWindowAttention(32, [7, 7], [3, 3], 2).double()
    torch.nn.init.normal_(other.qkv.bias)
    for kind in (reference.WindowAttention2d, vf.FastWindowAttention2d):
        ours = kind(32, 7, 2, 3, layout="nhwc").double()
        ours.load_state_dict(other.state_dict())
        x = feature_map((2, *size, 32), "nchw", torch.float64)
        got, want = run(ours, x), run(other, x)
        want.pop("relative_position_index", None)
        assert got.keys() == want.keys()
        for name, expected in want.items():
            torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-10)
    missing = other.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["relative_position_index"]


@others
def test_layouts_and_weights():
    """Token grids and feature maps give the same; the maps of weights sum to one in every window."""
    torch.manual_seed(0)
    maps = vf.FastWindowAttention2d(16, (4, 3), 2, (1, 2))
    grids = vf.FastWindowAttention2d(16, (4, 3), 2, (1, 2), layout="nhwc")
    grids.load_state_dict(maps.state_dict())
    x = feature_map((2, 16, 7, 6), "nchw", torch.float32)
    y, received = maps(x, need_weights="mean")
    torch.testing.assert_close(grids(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), y)
    torch.testing.assert_close(grids.attention(x.permute(0, 2, 3, 1))["received"], received)
    again, weights = maps(x, need_weights="full")
    assert torch.equal(again, y)
    assert weights.shape == (2, 4, 2, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 2, 12))
    assert received.shape == (2, 2, 7, 6)
    # 7 x 6 tokens are 8 x 6 positions: without padding, what is received in a window sums to one.
    whole = maps.attention(x[:, :, :4, :3])["received"]
    torch.testing.assert_close(whole.sum((2, 3)), torch.ones(2, 2))
    for bad in (maps, grids):
        with pytest.raises(ValueError, match="need_weights must be one of"):
            bad(x, need_weights="all")
    with pytest.raises(ValueError, match=r"x must have shape \[N, H, W, 16\] .*got \[2, 16, 7, 6\]"):
        grids(x)


@others
def test_linear_layers(monkeypatch):
    """oneDNN's products and PyTorch's: values, gradients of what needs them, both orders, mixed strides, no tokens."""
    monkeypatch.setattr(sys.modules["visattn_fast.ops.linear"], "_SMALL", 0)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(12, 8), torch.randn(12)
    for given in (x, x.transpose(1, 2), x[:1].expand(4, 3, 5, 8), x[:0]):
        for b in (bias, None):
            got = gradients(ops.linear, [t if t is None else leaf(t, torch.float32) for t in (given, weight, b)])
            want = gradients(
                torch.nn.functional.linear, [t if t is None else leaf(t, torch.float64) for t in (given, weight, b)]
            )
            assert_near(got, want, 2e-6)
    frozen = ops.linear(x.requires_grad_(), weight, bias)
    (dx,) = torch.autograd.grad(frozen.sum(), x, create_graph=True)
    torch.testing.assert_close(dx, weight.sum(0).expand_as(dx))
    leaves = [leaf(t, torch.float32) for t in (x, weight, bias)]
    (dx,) = torch.autograd.grad(ops.linear(*leaves).square().sum(), leaves[0], create_graph=True)
    got = torch.autograd.grad(dx.square().sum(), leaves)
    doubles = [leaf(t, torch.float64) for t in leaves]
    (dx,) = torch.autograd.grad(torch.nn.functional.linear(*doubles).square().sum(), doubles[0], create_graph=True)
    assert_near(got, torch.autograd.grad(dx.square().sum(), doubles), 1e-5)
    torch.library.opcheck(torch.ops.visattn_fast.linear_fwd.default, (x.detach(), weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
    assert ops.linear(x.double(), weight.double()).dtype == torch.float64
