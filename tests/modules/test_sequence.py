"""Attention over sequences: against its formulas, under masks and padding, fast against reference, and bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import visattn_fast as vf
from visattn_fast import functional, reference
from visattn_fast.ops import additive_score
from visattn_fast.ops.library import OPS

N, Q, K, D = 3, 5, 7, 6
NAN = float("nan")
LENGTHS = torch.tensor([7, 4, 0])
SCORES = reference.sequence.SCORES


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """At these sizes, too, the additive score goes in blocks and the products are fused."""
    monkeypatch.setattr(functional.sequence, "_SMALL", 0)
    monkeypatch.setattr(additive_score, "_LIMITS", {"cpu": 400})


def build(name, **options):
    """A reference module and its fast counterpart with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = {
            "layer": lambda: reference.AttentionLayer(D, 5, 8),
            "pooling": lambda: reference.AttentionPooling(),
            "sequence": lambda: reference.SequenceAttention(query_size=D, hidden_size=9, **options),
        }[name]()
    fast = getattr(vf, f"Fast{type(plain).__name__}").__new__(getattr(vf, f"Fast{type(plain).__name__}"))
    fast.__dict__.update(copy.deepcopy(plain.__dict__))
    return plain, fast


VARIANTS = {
    "layer": ("layer", {}),
    "pooling": ("pooling", {}),
    **{f"{s}": ("sequence", {"score": s}) for s in SCORES},
    **{f"{s}-window": ("sequence", {"score": s, "window": 2}) for s in SCORES},
    **{f"{s}-predictive": ("sequence", {"score": s, "window": 2, "predictive": True}) for s in SCORES},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
weighted = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])


def inputs(variant, dtype=torch.float32, scale=1.0):
    """Queries, keys and values of a variant, ``[N, L, D]`` or, for pooling, ``[N, L]``."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((N, Q), (N, K), (N, K)) if variant == "pooling" else ((N, Q, D), (N, K, D), (N, K, D))
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in sizes]


def padding(lengths=LENGTHS, size=K):
    return (torch.arange(size) < lengths[:, None])[:, None]


def gradients(module, tensors, **kw):
    """Output, weights, and the gradients of tensors and parameters."""
    module = copy.deepcopy(module)
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, weights = module(*tensors, **kw)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    wanted = [*tensors, *module.parameters()]
    return [out.detach(), weights, *torch.autograd.grad(out, wanted, grad, allow_unused=True)]


@variants
@weighted
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_fast_equals_reference(variant, need_weights, masked):
    plain, fast = (m.double() for m in build(VARIANTS[variant][0], **VARIANTS[variant][1]))
    mask = (torch.rand(N, Q, K, generator=torch.Generator().manual_seed(3)) < 0.7) & padding() if masked else None
    tensors = inputs(variant, torch.float64)
    expected, found = (gradients(m, tensors, mask=mask, need_weights=need_weights) for m in (plain, fast))
    torch.testing.assert_close(found, expected)
    assert (found[1] is None) == (not need_weights)


def test_layer_is_the_formula():
    plain, _ = build("layer")
    q, k, v = inputs("layer")
    out, weights = plain(q, k, v)
    scores = plain.W_q(q) @ plain.W_k(k).transpose(1, 2) / math.sqrt(5)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ plain.W_v(v))
    torch.testing.assert_close(plain(q)[0], plain(q, q, q)[0])
    assert {n: tuple(t.shape) for n, t in plain.state_dict().items()} == {
        "W_q.weight": (5, D),
        "W_k.weight": (5, D),
        "W_v.weight": (8, D),
    }


def test_pooling_is_nadaraya_watson():
    plain, fast = build("pooling")
    q, k, v = inputs("pooling")
    kernel = torch.exp(-(((q[:, :, None] - k[:, None]) * plain.w) ** 2) / 2)
    expected = (kernel * v[:, None]).sum(-1) / kernel.sum(-1)
    for module in (plain, fast):
        torch.testing.assert_close(module(q, k, v)[0], expected)
        own = k[:, None].expand(N, Q, K), v[:, None].expand(N, Q, K)
        torch.testing.assert_close(module(q, *own)[0], expected)
        torch.testing.assert_close(module(q[0], k[0], own[1][0])[0], expected[0])
    assert plain.state_dict().keys() == {"w"}


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_formulas(score):
    plain, _ = build("sequence", score=score)
    q, k, v = inputs(score)
    scores = torch.empty(N, Q, K)
    for i in range(Q):
        for j in range(K):
            a, b = q[:, i], k[:, j]
            if score == "concat":
                scores[:, i, j] = plain.v(torch.tanh(plain.W_q(a) + plain.W_k(b)))[:, 0]
            else:
                scores[:, i, j] = ((plain.W(a) if score == "general" else a) * b).sum(-1)
    context, weights = plain(q, k, v)
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(context, weights @ v)
    keys = {"dot": set(), "general": {"W.weight"}, "concat": {"W_q.weight", "W_k.weight", "v.weight"}}
    assert plain.state_dict().keys() == keys[score]


def test_window_is_local():
    """local-m: the query's index, or a given position, and the keys within +-D of it; local-p: a Gaussian around p."""
    plain, _ = build("sequence", score="dot", window=2)
    q, k, v = inputs("dot")
    inside = (torch.arange(K) - torch.arange(Q)[:, None]).abs() <= 2
    scores = (q @ k.transpose(1, 2)).masked_fill(~inside, -torch.inf)
    torch.testing.assert_close(plain(q, k, v)[1], scores.softmax(-1))
    position = torch.tensor([[0.5], [3.0], [6.0]])
    inside = (torch.arange(K) - position[..., None]).abs() <= 2
    scores = (q @ k.transpose(1, 2)).masked_fill(~inside, -torch.inf)
    torch.testing.assert_close(plain(q, k, v, position=position)[1], scores.softmax(-1))

    plain, _ = build("sequence", score="dot", window=2, predictive=True)
    lengths = torch.tensor([7, 4, 2])
    p = lengths[:, None] * torch.sigmoid(plain.v_p(torch.tanh(plain.W_p(q)))[..., 0])
    distance = torch.arange(K) - p[..., None]
    inside = (distance.abs() <= 2) & padding(lengths)
    scores = (q @ k.transpose(1, 2)).masked_fill(~inside, -torch.inf)
    expected = scores.softmax(-1) * torch.exp(-(distance**2) / 2)
    torch.testing.assert_close(plain(q, k, v, key_lengths=lengths)[1], expected)


@variants
@weighted
@pytest.mark.parametrize("which", [0, 1], ids=["reference", "fast"])
def test_fully_masked_rows_are_zeros(variant, need_weights, which):
    """A query that may attend to nothing gets zeros, and finite gradients, and so does everybody else."""
    module = build(VARIANTS[variant][0], **VARIANTS[variant][1])[which]
    mask = torch.ones(N, Q, K, dtype=torch.bool)
    mask[0, 1] = mask[2] = False
    out, weights, *grads = gradients(module, inputs(variant), mask=mask, need_weights=need_weights)
    for row in [out[0, 1], out[2]] + ([weights[0, 1], weights[2]] if need_weights else []):
        assert not row.any()
    assert out[1].any()
    assert all(g is None or g.isfinite().all() for g in grads)


@variants
@weighted
@pytest.mark.parametrize("which", [0, 1], ids=["reference", "fast"])
def test_nan_in_padding_does_not_leak(variant, need_weights, which):
    """Masked keys, values and queries may hold NaN: results and all gradients are those of zeros there."""
    module = build(VARIANTS[variant][0], **VARIANTS[variant][1])[which]
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
@pytest.mark.parametrize("which", [0, 1], ids=["reference", "fast"])
def test_padded_self_attention(need_weights, which):
    """With one padding mask for all queries, the padded positions are blank as queries, too."""
    module = build("layer")[which]
    _, x, _ = inputs("layer")
    clean, dirty = x.clone(), x.clone()
    for t, filling in ((clean, 0.0), (dirty, NAN)):
        t[1, 4:] = t[2] = filling
    expected, found = (gradients(module, [t], mask=padding(), need_weights=need_weights) for t in (clean, dirty))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_key_lengths_are_a_mask(score):
    for module in build("sequence", score=score):
        q, k, v = inputs(score)
        torch.testing.assert_close(module(q, k, v, key_lengths=LENGTHS), module(q, k, v, mask=padding()))


@variants
@weighted
def test_large_logits(variant, need_weights):
    for module in build(VARIANTS[variant][0], **VARIANTS[variant][1]):
        for dtype, scale in ((torch.float32, 1e6), (torch.float16, 1e3)):
            found = gradients(module.to(dtype), inputs(variant, dtype, scale), need_weights=need_weights)
            assert found[0].isfinite().all()
            module.float()


@pytest.mark.parametrize("variant", ["layer", "pooling", *SCORES])  # a rounded position may let another key in
@weighted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(variant, need_weights, dtype):
    """Results keep the dtype, and err at most twice as much as the reference in it, and a rounding band."""
    plain, fast = build(VARIANTS[variant][0], **VARIANTS[variant][1])
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
def test_autocast(variant, need_weights):
    plain, fast = build(VARIANTS[variant][0], **VARIANTS[variant][1])
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(m, inputs(variant), need_weights=need_weights) for m in (plain, fast))
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0.05)
    assert all(g is None or g.isfinite().all() for g in found)


@variants
@weighted
def test_compile(variant, need_weights):
    torch._dynamo.reset()
    _, fast = build(VARIANTS[variant][0], **VARIANTS[variant][1])
    compiled = torch.compile(fast, fullgraph=True)
    tensors = [t.requires_grad_() for t in inputs(variant)]
    results = []
    for module in (compiled, fast):
        out = module(*tensors, mask=padding(), need_weights=need_weights)[0]
        results.append(torch.autograd.grad(out.square().sum(), [*tensors, *fast.parameters()], allow_unused=True))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@variants
def test_gradcheck(variant):
    """Both orders, with weights; the products' own kernels without weights have PyTorch's first order alone."""
    for module in (m.double() for m in build(VARIANTS[variant][0], **VARIANTS[variant][1])):
        tensors = [t.requires_grad_() for t in inputs(variant, torch.float64)]
        assert torch.autograd.gradcheck(lambda *t, m=module: m(*t, mask=padding())[0], tensors)
        assert torch.autograd.gradgradcheck(lambda *t, m=module: m(*t, mask=padding())[0], tensors, fast_mode=True)


def test_additive_score_in_blocks(monkeypatch):
    """Blocks of one query, of several, and of several images give what the formula gives, in both directions."""
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
def test_opcheck(dtype):
    q, k, v = (torch.randn(s).to(dtype) for s in ((2, 4, 3), (2, 5, 3), (3,)))
    for name, args in {"fwd": (q, k, v), "bwd": (torch.randn(2, 4, 5).to(dtype), q, k, v)}.items():
        assert f"additive_score_{name}" in OPS
        torch.library.opcheck(getattr(torch.ops.visattn_fast, f"additive_score_{name}").default, args)


def test_no_map_without_weights():
    """A long sequence goes through without an [N, Q, K] map, forward and backward."""
    fast = vf.FastAttentionLayer(8, 8, 4)
    x = torch.randn(1, 4096, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        fast(x, need_weights=False)[0].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 4096 * 4096  # bytes; the map has four times as many


@variants
def test_attention(variant):
    for module in build(VARIANTS[variant][0], **VARIANTS[variant][1]):
        maps = module.attention(*inputs(variant))
        assert maps.keys() == {"position"}
        torch.testing.assert_close(maps["position"], module(*inputs(variant))[1])


def test_reference_can_be_chosen():
    """Under ``use_backend("reference")`` the fast modules are the reference, double backward included."""
    _, fast = build("layer")
    x = torch.randn(1, 4, D, requires_grad=True)
    with vf.use_backend("reference"):
        (g,) = torch.autograd.grad(fast(x, need_weights=False)[0].sum(), x, create_graph=True)
        g.square().sum().backward()
    assert x.grad.isfinite().all()


def test_agrees_with_pytorch():
    """`nn.MultiheadAttention` with one head and the same weights, padding included."""
    plain = reference.AttentionLayer(D, D, D)
    twin = torch.nn.MultiheadAttention(D, 1, bias=False, batch_first=True)
    with torch.no_grad():
        twin.in_proj_weight.copy_(torch.cat([plain.W_q.weight, plain.W_k.weight, plain.W_v.weight]))
        twin.out_proj.weight.copy_(torch.eye(D))
    x, lengths = torch.randn(N, K, D), torch.tensor([7, 4, 1])
    expected = twin(x, x, x, key_padding_mask=~padding(lengths)[:, 0])
    found = plain(x, x, mask=padding(lengths))
    torch.testing.assert_close(found, expected)
    assert F.mse_loss(found[0], expected[0]) < 1e-10
