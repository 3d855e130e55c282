"""Training with gates whose mathematics the caller brings: penalties, frozen inputs, autocast, memory, compilation."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import feature_map, layouts
from variants import CUSTOM
from visattn_fast import reference

C = 24  # channels
kinds = pytest.mark.parametrize("kind", CUSTOM)


@kinds
def test_result_and_gradient_penalty_in_one_backward_pass(kind):
    """The loss has the result and its gradient, so that one backward pass holds carriers and second derivatives."""
    found = []
    for module in CUSTOM[kind].pair(8, torch.float64):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float64).requires_grad_()
        y = module(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.cos().sum() + gradient.square().sum()).backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@kinds
def test_only_inputs_that_require_a_gradient_get_one(kind):
    """x alone or the parameters alone require gradients; a call without either records nothing."""
    fast, plain = CUSTOM[kind].pair(8, torch.float64)
    x = feature_map((2, 8, 4, 4), "nchw", torch.float64)
    want = list(plain.parameters())
    expected = torch.autograd.grad(plain(x).square().sum(), want, allow_unused=True)
    got = torch.autograd.grad(fast(x).square().sum(), list(fast.parameters()), allow_unused=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((fast, plain), leaves, strict=True):
        module.requires_grad_(False)(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-9, atol=1e-10)
    assert not fast(x).requires_grad


def test_constant_gates_scale_the_gradient():
    x = feature_map((2, C, 4, 5), "nchw", torch.float64).requires_grad_()
    scale = torch.full((2, C, 1, 1), 0.5, dtype=torch.float64)
    pixels = torch.full((2, 1, 4, 5), 2.0, dtype=torch.float64)
    for y in (
        vf.functional.gate_channels(x, lambda _: scale),
        vf.functional.gate_twice(x, lambda *_: scale, lambda _: pixels) / 2,
    ):
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, torch.full_like(x, 0.5))


@kinds
def test_autocast_keeps_the_dtype_of_x(kind):
    fast, plain = CUSTOM[kind].pair(C)
    for dtype in (torch.float32, torch.bfloat16):
        x = feature_map((2, C, 6, 7), "nchw", dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, want = fast(x), plain(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, want.to(dtype), rtol=0.05, atol=0.05)
    residual = torch.ones(2, C, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(feature_map((2, C, 6, 7), "nchw", torch.bfloat16), residual=residual)
    assert y.dtype == torch.float32


@kinds
@layouts
def test_forward_saves_no_second_copy_of_x(kind, layout):
    """Training saves x and small maps, and repeats give the same bits."""
    fast, _ = CUSTOM[kind].pair(C)
    x = feature_map((2, C, 48, 48), layout, torch.float32).requires_grad_()
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first = fast(x)
    assert saved.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(saved.values()) < 0.6 * x.nbytes  # a dozen values a pixel; x has 24
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (first, fast.train()(x))]
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", ["even", "channels"])
def test_compiled_gate_matches_reference(kind):
    fast, plain = CUSTOM[kind].pair(8)
    x = feature_map((2, 8, 6, 5), "channels_last", torch.float32).requires_grad_()
    y = torch.compile(fast, fullgraph=True, backend="aot_eager")(x, residual=x, activation="relu")
    want = reference.epilogue(plain(x), x, "relu")
    found = [(v, *torch.autograd.grad(v.square().sum(), [x, *m.parameters()])) for v, m in ((y, fast), (want, plain))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", ["gate_channels", "gate_twice"])
@pytest.mark.parametrize("module", [vf.functional, reference], ids=["fast", "reference"])
def test_bad_argument_raises(function, module):
    call, gates = getattr(module, function), {"gate_channels": (lambda m: m,), "gate_twice": (None, lambda m: m[:, :1])}
    x = torch.ones(2, 8, 4, 4)
    call(x, *gates[function])
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\]"):
        call(x[0, 0], *gates[function])
    with pytest.raises(TypeError, match="floating"):
        call(x.int(), *gates[function])
    if function == "gate_twice":
        with pytest.raises(ValueError, match=r"spatial must return shape \[2, 1, 4, 4\], got \[2, 2, 4, 4\]"):
            call(x, None, lambda m: m)
        with pytest.raises(ValueError, match=r"channel must return shape \[2, 8, 1, 1\], got \[2, 8\]"):
            call(x, lambda m, _: m.flatten(1), lambda m: m[:, :1])
        with pytest.raises(ValueError, match=r"ties must be one of \('first', 'even'\), got 'last'"):
            call(x, None, lambda m: m[:, :1], ties="last")
    else:
        with pytest.raises(ValueError, match=r"gate must return shape \[2, 8, 1, 1\], got \[2, 8\]"):
            call(x, lambda m: m.flatten(1))
