"""Attention inside windows: odd maps and windows, strides, seams, weights; timm's and torchvision's modules."""

from __future__ import annotations

import sys

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED, feature_map, poisoned, run, targets, threads, value_and_gradients
from outside import library
from visattn_fast import reference
from visattn_fast.ops.library import OPS

quiet = pytest.mark.filterwarnings("ignore")  # of the other libraries

# (window, shift, pad_first, [N, H, W], heads, C): whole windows, padding, seams in the padding, long and small windows.
GEOMETRIES = [
    ((7, 7), (3, 3), False, (1, 13, 9), 1, 16),
    ((2, 3), (1, 2), False, (1, 5, 7), 1, 3),
    ((7, 7), (3, 3), True, (1, 3, 5), 2, 40),  # one window, shifted nevertheless
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
    """Returns qkv ``[N, H, W, 3C]``, its bias and the table, so large that the softmax is far from uniform."""
    sizes = ((*shape, 3 * channels), (3 * channels,), ((2 * window[0] - 1) * (2 * window[1] - 1), heads))
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return [t.to(device, dtype).requires_grad_() for t in made]


def exact(inputs, *arguments):
    """Returns the value and the gradients of the reference in float64."""
    doubles = [t if t is None else leaf(t, torch.float64) for t in inputs]
    return value_and_gradients(reference.window_attention, doubles, *arguments)


def leaf(t, dtype):
    return t.detach().to(dtype).requires_grad_()


def assert_near(got, want, tolerance):
    """Asserts that each tensor is within ``tolerance`` times the largest expected value."""
    for found, expected in zip(got, want, strict=True):
        allowed = 1e-30 + (tolerance * expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=allowed)


@targets
@pytest.mark.parametrize(("window", "shift", "pad_first", "shape", "heads", "channels"), GEOMETRIES, ids=str)
def test_geometries_match_reference(window, shift, pad_first, shape, heads, channels, device, backend):
    inputs = tensors(shape, heads, channels, window, device)
    for given in (inputs, [inputs[0], None, inputs[2]])[: 1 if INTERPRETED else 2]:
        arguments = (heads, window, shift, None, pad_first)
        with vf.use_backend(backend), poisoned():
            got = value_and_gradients(vf.functional.window_attention, given, *arguments)
        assert_near(got, exact(given, *arguments), 4e-6)


@targets
def test_strides_and_mixed_dtypes_match_reference(device, backend):
    """qkv is a slice, transposed or expanded; bias, table and qkv differ in dtype; the gradient is strided."""
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
def test_large_logits_do_not_overflow_and_cross_seams(device, backend, monkeypatch):
    """A seam lowers a logit by 100, not by infinity: larger logits cross it, as in the reference."""
    inputs = tensors((1, 8, 8), 1, 16, (4, 4), device)
    with torch.no_grad():
        inputs[0][..., :32] *= 6
    want = exact(inputs, 1, 4, 2)
    with vf.use_backend(backend):
        assert_near(value_and_gradients(vf.functional.window_attention, inputs, 1, 4, 2), want, 1e-4)
    monkeypatch.setattr(sys.modules[reference.window_attention.__module__], "APART", -torch.inf)
    assert not torch.allclose(exact(inputs, 1, 4, 2)[0], want[0], atol=0.1)


@targets
def test_repeats_give_the_same_bits(device, backend):
    """Runs with any number of threads give the same bits, in the gradient of the table too."""
    inputs = tensors((1, 9, 7) if INTERPRETED else (2, 19, 22), 2, 16, (4, 5), device)
    before, runs = torch.get_num_threads(), []
    for count in (before, *((1, 2, 3) if backend == "cpp" else (before,))):
        with vf.use_backend(backend), poisoned(), threads(count):
            runs.append(value_and_gradients(vf.functional.window_attention, inputs, 2, (4, 5), (2, 2)))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@targets
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str)
def test_ops_fit_schema_fake_and_reference(dtype, device, backend):
    """Maps with padding and without fit schema and fake; values and strides equal those of the reference op."""
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


def test_both_orders_match_finite_differences():
    """The map is padded, shifted and cut by seams."""
    for pad_first in (True, False):
        inputs = [leaf(t, torch.float64) for t in tensors((1, 3, 4), 2, 2, (2, 3))]
        arguments = (2, (2, 3), (1, 1), None, pad_first)
        for function in (reference.window_attention, vf.functional.window_attention):
            assert torch.autograd.gradcheck(lambda *t, f=function, a=arguments: f(*t, *a), inputs)
            assert torch.autograd.gradgradcheck(lambda *t, f=function, a=arguments: f(*t, *a), inputs, fast_mode=True)


@quiet
@pytest.mark.parametrize("size", [(14, 14), (9, 16), (5, 6)], ids=str)
def test_timm_block_has_the_same_weights_and_results(size):
    """The state_dict of timm's attention loads here, and ours loads there."""
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
            want = value_and_gradients(lambda x, *_, b=block: b._attn(x), [leaf(x, x.dtype), *parameters.values()])
            got = run(ours, x)
            for name, expected in zip(("y", "x", *parameters), want, strict=True):
                torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-10)


@quiet
@pytest.mark.parametrize("size", [(14, 14), (9, 16), (5, 6)], ids=str)
def test_torchvision_attention_has_the_same_weights_and_results(size):
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


def test_weights_sum_to_one_in_both_layouts():
    """Token grids and feature maps give the same results, and the weights of each window sum to one."""
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
    # 7 x 6 tokens are padded to 8 x 6 positions. Without padding, the weights received in a window sum to one.
    whole = maps.attention(x[:, :, :4, :3])["received"]
    torch.testing.assert_close(whole.sum((2, 3)), torch.ones(2, 2))
    for bad in (maps, grids):
        with pytest.raises(ValueError, match="need_weights must be one of"):
            bad(x, need_weights="all")
    with pytest.raises(ValueError, match=r"x must have shape \[N, H, W, 16\] .*got \[2, 16, 7, 6\]"):
        grids(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_biases_of_any_strides_are_read(compiled):
    """A bias may be a column of a matrix, as parametrizations make them. The products are large: oneDNN serves."""
    torch.manual_seed(0)
    fast = vf.FastWindowAttention2d(96, heads=3, window=7)
    plain = reference.WindowAttention2d(96, heads=3, window=7)
    plain.load_state_dict(fast.state_dict())
    for module in (fast, plain):
        for layer in (module.qkv, module.proj):
            columns = torch.stack([layer.bias.detach() + 1, torch.full_like(layer.bias, 100.0)], 1)
            layer.bias = torch.nn.Parameter(columns[:, 0])
    x = feature_map((1, 96, 56, 56), "nchw", torch.float32)
    module = torch.compile(fast, backend="aot_eager") if compiled else fast
    torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-4)
