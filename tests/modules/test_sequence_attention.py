"""Attention over sequences: fast modules against the reference, masks, padding, dtypes, memory."""

from __future__ import annotations

import copy

import pytest
import torch

import visattn_fast as vf
from sequences import (
    LENGTHS,
    SCORES,
    K,
    N,
    Q,
    build,
    build_variant,
    gradients,
    inputs,
    padding,
    variants,
    weighted,
)
from visattn_fast import functional, reference
from visattn_fast.fused import sequence
from visattn_fast.ops import additive_score

NAN = float("nan")
classes = pytest.mark.parametrize("which", [0, 1], ids=["reference", "fast"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes the additive score run in blocks, and the products fused, at these small sizes too."""
    monkeypatch.setattr(sequence, "_SMALL", 0)
    monkeypatch.setattr(additive_score, "_LIMITS", {"cpu": 400})


@variants
@weighted
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_fast_modules_match_reference(variant, need_weights, masked):
    plain, fast = (m.double() for m in build_variant(variant))
    mask = (torch.rand(N, Q, K, generator=torch.Generator().manual_seed(3)) < 0.7) & padding() if masked else None
    tensors = inputs(variant, torch.float64)
    expected, found = (gradients(m, tensors, mask=mask, need_weights=need_weights) for m in (plain, fast))
    torch.testing.assert_close(found, expected)
    assert (found[1] is None) == (not need_weights)


@variants
@weighted
@classes
def test_fully_masked_rows_are_zeros(variant, need_weights, which):
    """A query without keys gets zeros; the other queries do not, and all gradients are finite."""
    module = build_variant(variant)[which]
    mask = torch.ones(N, Q, K, dtype=torch.bool)
    mask[0, 1] = mask[2] = False
    out, weights, *grads = gradients(module, inputs(variant), mask=mask, need_weights=need_weights)
    for row in [out[0, 1], out[2]] + ([weights[0, 1], weights[2]] if need_weights else []):
        assert not row.any()
    assert out[1].any()
    assert all(g is None or g.isfinite().all() for g in grads)


@variants
@weighted
@classes
def test_nan_in_padding_does_not_leak(variant, need_weights, which):
    """Masked keys, values and queries may be NaN: results and gradients are the same as with zeros."""
    module = build_variant(variant)[which]
    mask = padding() & (torch.arange(Q) < 4)[:, None]
    kw = {"need_weights": need_weights, "mask": mask}
    clean, dirty = inputs(variant), inputs(variant)
    for tensors, filling in ((clean, 0.0), (dirty, NAN)):
        tensors[0][:, 4:] = filling
        for t in tensors[1:]:
            t[1, 4:] = t[2] = filling
    expected, found = gradients(module, clean, **kw), gradients(module, dirty, **kw)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(t is None or t.isfinite().all() for t in found)


@weighted
@classes
def test_padding_of_self_attention_masks_queries_too(need_weights, which):
    """One padding mask for all queries blanks the padded positions as queries too, which may be NaN."""
    module = build("layer")[which]
    _, x, _ = inputs("layer")
    clean, dirty = x.clone(), x.clone()
    for t, filling in ((clean, 0.0), (dirty, NAN)):
        t[1, 4:] = t[2] = filling
    expected, found = (gradients(module, [t], mask=padding(), need_weights=need_weights) for t in (clean, dirty))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_key_lengths_equal_a_mask(score):
    for module in build("sequence", score=score):
        q, k, v = inputs(score)
        torch.testing.assert_close(module(q, k, v, key_lengths=LENGTHS), module(q, k, v, mask=padding()))


@variants
@weighted
def test_large_logits_do_not_overflow(variant, need_weights):
    for module in build_variant(variant):
        for dtype, scale in ((torch.float32, 1e6), (torch.float16, 1e3)):
            found = gradients(module.to(dtype), inputs(variant, dtype, scale), need_weights=need_weights)
            assert found[0].isfinite().all()
            module.float()


@pytest.mark.parametrize("variant", ["layer", "pooling", *SCORES])  # a rounded position may admit another key
@weighted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_errs_at_most_twice_as_the_reference(variant, need_weights, dtype):
    """The error is at most twice that of the reference, plus a rounding band; results keep the dtype."""
    plain, fast = build_variant(variant)
    tensors = [t.to(dtype) for t in inputs(variant)]
    exact = gradients(copy.deepcopy(plain).to(dtype).double(), [t.double() for t in tensors], need_weights=need_weights)
    eager, found = (gradients(m.to(dtype), tensors, need_weights=need_weights) for m in (plain, fast))
    for got, other, want in zip(found, eager, exact, strict=True):
        if got is not None:
            assert got.dtype == other.dtype == dtype
            error, allowed = ((t.double() - want).abs().max() for t in (got, other))
            assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * want.abs().max()


@variants
@weighted
def test_autocast_matches_reference(variant, need_weights):
    plain, fast = build_variant(variant)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(m, inputs(variant), need_weights=need_weights) for m in (plain, fast))
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0.05)
    assert all(g is None or g.isfinite().all() for g in found)


@variants
@weighted
def test_compiled_module_has_the_same_gradients(variant, need_weights):
    torch._dynamo.reset()
    _, fast = build_variant(variant)
    compiled = torch.compile(fast, fullgraph=True)
    tensors = [t.requires_grad_() for t in inputs(variant)]
    results = []
    for module in (compiled, fast):
        out = module(*tensors, mask=padding(), need_weights=need_weights)[0]
        results.append(torch.autograd.grad(out.square().sum(), [*tensors, *fast.parameters()], allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@variants
def test_both_orders_match_finite_differences(variant):
    """The modules return weights; without weights PyTorch's fused products have no second order."""
    for module in (m.double() for m in build_variant(variant)):
        tensors = [t.requires_grad_() for t in inputs(variant, torch.float64)]
        assert torch.autograd.gradcheck(lambda *t, m=module: m(*t, mask=padding())[0], tensors)
        assert torch.autograd.gradgradcheck(lambda *t, m=module: m(*t, mask=padding())[0], tensors, fast_mode=True)


def test_size_of_blocks_does_not_change_the_additive_score(monkeypatch):
    """Blocks of one query, of several queries, and of several sequences match the reference, gradients included."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(s, generator=generator).double().requires_grad_() for s in ((4, 9, 8), (4, 6, 8), (8,)))
    grad = torch.randn(4, 9, 6, generator=generator).double()
    expected = reference.additive_score(q, k, v)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)
    for elements, blocks in {1: 36, 100: 20, 1000: 2, 10**6: 1}.items():
        monkeypatch.setattr(additive_score, "_LIMITS", {"cpu": elements})
        assert len(list(additive_score._blocks(q, k))) == blocks
        found = functional.additive_score(q, k, v)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, (q, k, v), grad), gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_additive_score_ops_fit_their_contracts(dtype):
    q, k, v = (torch.randn(s).to(dtype) for s in ((2, 4, 3), (2, 5, 3), (3,)))
    for name, args in {"fwd": (q, k, v), "bwd": (torch.randn(2, 4, 5).to(dtype), q, k, v)}.items():
        torch.library.opcheck(getattr(torch.ops.visattn_fast, f"additive_score_{name}").default, args)


def test_long_sequence_without_weights_allocates_no_map():
    """Neither direction holds an [N, Q, K] map."""
    fast = vf.FastAttentionLayer(8, 8, 4)
    x = torch.randn(1, 4096, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        fast(x, need_weights=False)[0].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4096 * 4096  # bytes; the map has four times as many


@variants
def test_attention_returns_the_weights_by_position(variant):
    for module in build_variant(variant):
        maps = module.attention(*inputs(variant))
        assert maps.keys() == {"position"}
        torch.testing.assert_close(maps["position"], module(*inputs(variant))[1])


def test_chosen_reference_has_a_second_order():
    """Under ``use_backend("reference")`` fast modules equal the reference, in double backward too."""
    found = []
    for module in build("layer"):
        x = inputs("layer")[0].requires_grad_()
        with vf.use_backend("reference"):
            (g,) = torch.autograd.grad(module(x, need_weights=False)[0].sum(), x, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), [x, *module.parameters()], allow_unused=True))
    torch.testing.assert_close(*found, rtol=0, atol=0)
