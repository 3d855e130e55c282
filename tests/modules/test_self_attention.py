"""Attention over the positions of maps, `functional.attention2d`: results, gradients, masks, large scores, NaN."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import visattn_fast as vf
from cases import DEVICES, DTYPES, TARGETS, needs_dtype, poisoned, targets
from visattn_fast import reference
from visattn_fast.ops import self_attention as ops
from visattn_fast.ops.library import OPS
from visattn_fast.reference.self_attention import relative_bias

functional = importlib.import_module("visattn_fast.fused.self_attention")  # the module, not the function
with_reference = pytest.mark.parametrize(("device", "backend"), [*TARGETS, *((d, "reference") for d in DEVICES)])
SIZE, HEADS, D = (3, 5), 2, 8
CASES = list(itertools.product((False, True), repeat=2))  # with a bias, with a mask


def tensors(bias, masked, dtype=torch.float32, device="cpu", images=3, size=SIZE, d=D):
    """Returns qkv, a table for larger maps, and a mask with some, none and all of the keys of the three images."""
    generator = torch.Generator().manual_seed(0)
    qkv, table = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
        for s in ((images, *size, 3, HEADS, d), (2 * size[0] + 1, 2 * size[1] + 3, HEADS))
    )
    mask = torch.rand(images, *size, generator=generator) < 0.6
    mask[1], mask[2] = False, True
    return qkv, table if bias else None, mask.to(device) if masked else None


def results(function, qkv, table, mask, **options):
    """Returns the result, the mean weights, and every gradient."""
    out, mean = function(qkv, table, mask, need_weights="mean", **options)
    grad = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.device, out.dtype)
    wanted = [t for t in (qkv, table) if t is not None]
    return out.detach(), mean, *torch.autograd.grad(out, wanted, grad)


@pytest.mark.interpreted
@with_reference
@pytest.mark.parametrize(("bias", "masked"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_the_references(dtype, bias, masked, device, backend):
    """The error against float64 is at most twice that of the reference, plus a rounding band; repeats are equal."""
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


@pytest.mark.interpreted
@with_reference
def test_result_is_that_of_pytorchs_function(device, backend):
    """PyTorch's function takes the expanded bias; a map smaller than the table's uses the middle of the table."""
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


@pytest.mark.parametrize(("bias", "masked"), CASES)
def test_dtypes_without_a_kernel_match_reference(bias, masked):
    """PyTorch serves float16: by operations in blocks on CPUs, by its own function on other devices."""
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


@pytest.mark.interpreted
@with_reference
@pytest.mark.parametrize("bias", [False, True])
def test_masked_keys_and_values_reach_nothing(bias, device, backend):
    """Masked keys and values may be NaN, and their gradients are zero; an image without keys gives zeros."""
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


@pytest.mark.interpreted
@with_reference
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_scores_do_not_overflow(bias, dtype, device, backend):
    """With scores in the thousands a weight is one or zero."""
    needs_dtype(backend, device, dtype)
    qkv, table, _ = tensors(bias, False, dtype, device)
    qkv = (qkv.detach() * torch.tensor([100.0, 100.0, 1.0], dtype=dtype, device=device)[:, None, None]).requires_grad_()
    exact = results(reference.attention2d, qkv.double(), None if table is None else table.double(), None)
    with vf.use_backend(backend):
        found = results(vf.functional.attention2d, qkv, table, None)
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.02, atol=0.02)


@pytest.mark.interpreted
@with_reference
@pytest.mark.parametrize("size", [SIZE, (6, 5)])  # fewer keys than a SIMD vector has lanes, and more
def test_nan_reaches_only_what_depends_on_it(size, device, backend):
    """A NaN in a query reaches its own result, one in a key its image, one in a value its channel."""
    for part, wrong in ((0, 1), (1, size[0] * size[1]), (2, size[0] * size[1])):
        qkv = tensors(False, False, device=device, size=size)[0].detach().clone()
        qkv[0, 2, 3, part, 1, 4] = torch.nan
        with vf.use_backend(backend):
            out, _ = vf.functional.attention2d(qkv)
        assert out.isnan().any(4).sum((1, 2)).tolist() == [[0, wrong], [0, 0], [0, 0]]


@pytest.mark.parametrize(("bias", "masked"), CASES)
def test_size_of_blocks_changes_nothing(bias, masked, monkeypatch):
    """Blocks of one row, of several rows, and of single images match the reference."""
    inputs = tensors(bias, masked, torch.float64)
    expected = results(reference.attention2d, *inputs)
    for limit in (1, 700, 1500, 4000):
        monkeypatch.setattr(ops, "_BLOCK", limit)
        with vf.use_backend("auto"):
            torch.testing.assert_close(results(vf.functional.attention2d, *inputs), expected)


@pytest.mark.parametrize(("bias", "masked"), CASES)
def test_both_orders_match_finite_differences(bias, masked):
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
def test_ops_fit_schema_fake_and_reference(images, bias, masked, device, backend):
    """Values and strides of every kernel equal those of the reference op, the mean of the weights included."""
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


QKV = torch.randn(2, *SIZE, 3, HEADS, D)


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
def test_bad_argument_raises(args, error, message, function):
    with pytest.raises(error, match=message):
        function(*args)
