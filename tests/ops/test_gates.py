"""Gates whose mathematics the caller brings, against plain PyTorch: maxima with and without equals among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import visattn_fast as vf
from cases import EPILOGUES, INTERPRETED, TARGETS, check, feature_map, needs_dtype, poisoned
from visattn_fast import catalogue, reference
from visattn_fast.ops.library import OPS

C = 24
layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
targets = pytest.mark.parametrize(("device", "backend"), TARGETS)
native = pytest.mark.skipif(INTERPRETED, reason="one kernel or another, this is the same")


class Twice(nn.Module):
    """A CBAM with biases and a batch norm, and SiLU for ReLU."""

    function: Any = staticmethod(reference.gate_twice)

    def __init__(self, channels: int = C, ties: str = "even", with_channel: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.SiLU(), nn.Conv2d(4, channels, 1))
        if not with_channel:
            del self.mlp
        self.conv, self.bn = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)
        self.ties, self.with_channel = ties, with_channel

    def forward(self, x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        def channel(mean, maximum):
            return (self.mlp(mean) + self.mlp(maximum)).sigmoid()

        def spatial(maps):
            return self.bn(self.conv(maps)).sigmoid()

        return self.function(x, channel if self.with_channel else None, spatial, ties=self.ties, **epilogue)


class FastTwice(Twice):
    function = staticmethod(vf.functional.gate_twice)


class Channels(nn.Module):
    """Squeeze-and-excitation with GELU and tanh."""

    function: Any = staticmethod(reference.gate_channels)

    def __init__(self, channels: int = C) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GELU(), nn.Conv2d(4, channels, 1), nn.Tanh())

    def forward(self, x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        return self.function(x, self.mlp, **epilogue)


class FastChannels(Channels):
    function = staticmethod(vf.functional.gate_channels)


def entry(fast: type[nn.Module], **arguments: Any) -> catalogue.Entry:
    return catalogue.Entry("gates", fast, fast.__bases__[0], lambda c: {"channels": c, **arguments}, 4, 5)


KINDS = {
    "even": entry(FastTwice),
    "first": entry(FastTwice, ties="first"),
    "no channel gate": entry(FastTwice, with_channel=False),
    "channels": entry(FastChannels),
}
kinds = pytest.mark.parametrize("kind", KINDS)
# Zeros after a ReLU, and whole pixels of them; few values; all equal.
INPUTS = {
    "normal": lambda x: x,
    "relu": lambda x: x.relu() * (torch.arange(x.shape[3], device=x.device) % 3 != 0),
    "steps": lambda x: x.round(),
    "constant": lambda x: torch.full_like(x, 0.75),
}


@targets
@layouts
@kinds
@pytest.mark.parametrize("shape", [(2, C, 7, 6), (3, 5, 9, 11), (2, 8, 1, 3), (0, 8, 4, 4)], ids=str)
def test_parity(kind, shape, layout, device, backend):
    check(KINDS[kind], feature_map(shape, layout, torch.float32, device), backend)


@targets
@layouts
@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(kind, dtype, layout, device, backend):
    needs_dtype(backend, device, dtype)
    check(KINDS[kind], feature_map((2, C, 7, 6), layout, dtype, device), backend)


@targets
@layouts
@pytest.mark.parametrize("inputs", list(INPUTS)[1:])
@pytest.mark.parametrize("kind", ["even", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties(dtype, kind, inputs, layout, device, backend):
    """As `torch.amax` shares a gradient among equals, and as `torch.max` gives it to the first."""
    x = INPUTS[inputs](feature_map((2, C, 9, 10), layout, dtype, device)).contiguous(
        memory_format=catalogue.LAYOUTS[layout]
    )
    check(KINDS[kind], x, backend)


@targets
@layouts
@kinds
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES[1:])
def test_epilogue(kind, with_residual, activation, layout, device, backend):
    fast, plain = (m.to(device) for m in KINDS[kind].pair(C, torch.float64))
    shape, results = (2, C, 5, 7), []
    for module in (fast, plain):
        x = feature_map(shape, layout, torch.float64, device).requires_grad_()
        residual = feature_map(shape, layout, torch.float64, device, seed=3).requires_grad_() if with_residual else None
        with vf.use_backend(backend):
            if module is fast:
                y = module(x, residual=residual, activation=activation)
            else:
                y = reference.epilogue(module(x), residual, activation)
        inputs = [x, *(p for p in module.parameters()), *([residual] if with_residual else [])]
        grad = feature_map(shape, "nchw", torch.float64, device, seed=1)
        results.append([y, *torch.autograd.grad(y, inputs, grad, allow_unused=True)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    assert results[0][0].stride() == results[0][1].stride() == x.stride()


@targets
@kinds
def test_nan(kind, device, backend):
    """A NaN makes NaN of what depends on it, in the result and in the gradient, and of nothing else."""
    fast, plain = (m.to(device).eval() for m in KINDS[kind].pair(C))
    results = []
    for module in (fast, plain):
        x = feature_map((2, C, 8, 9), "nchw", torch.float32, device)
        x[1, 3, 2, 4] = float("nan")
        x.requires_grad_()
        with vf.use_backend(backend):
            y = module(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        results.append((y.isnan(), dx.isnan()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0][1].any()
    assert not results[0][0][0].any()


@targets
@kinds
def test_strides(kind, device, backend):
    base = feature_map((2, 2 * C, 7, 12), "nchw", torch.float32, device)
    for x in (base[:, ::2], base[:, :C, :, ::2], base[:1, :C].expand(2, -1, -1, -1), base[:, :C].mT):
        check(KINDS[kind], x, backend)


@native
@kinds
@pytest.mark.parametrize("inputs", ["normal", "relu"])
def test_gradcheck(kind, inputs):
    """Both derivatives; no maximum is near another one unless it is equal, and then by its gate."""
    fast, _ = KINDS[kind].pair(4, torch.float64)
    x = INPUTS[inputs](feature_map((2, 4, 3, 4), "nchw", torch.float64)).requires_grad_()
    if inputs == "relu" and kind != "channels":
        grads = []
        for backend in ("auto", "reference"):  # where maxima are equal, no finite difference tells
            with vf.use_backend(backend):
                (dx,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
                grads.append([dx, *torch.autograd.grad(dx.square().sum(), [x, *fast.parameters()], allow_unused=True)])
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
        return
    assert torch.autograd.gradcheck(fast, (x,))
    assert torch.autograd.gradgradcheck(fast, (x,), fast_mode=True)


@native
@kinds
def test_penalty_with_result(kind):
    """A loss of the result and of its gradient, in one backward pass: messages and derivatives at once."""
    found = []
    for module in KINDS[kind].pair(8, torch.float64):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float64).requires_grad_()
        y = module(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.cos().sum() + gradient.square().sum()).backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@native
@kinds
def test_frozen(kind):
    """x alone, or the parameters alone, get their gradients; nothing is recorded where none is wanted."""
    fast, plain = KINDS[kind].pair(8, torch.float64)
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


@native
def test_gates_that_ignore_what_they_are_given():
    x = feature_map((2, C, 4, 5), "nchw", torch.float64).requires_grad_()
    scale = torch.full((2, C, 1, 1), 0.5, dtype=torch.float64)
    pixels = torch.full((2, 1, 4, 5), 2.0, dtype=torch.float64)
    for y in (
        vf.functional.gate_channels(x, lambda _: scale),
        vf.functional.gate_twice(x, lambda *_: scale, lambda _: pixels) / 2,
    ):
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, torch.full_like(x, 0.5))


@native
@kinds
def test_autocast_and_mixed(kind):
    fast, plain = KINDS[kind].pair(C)
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


@native
@kinds
@layouts
def test_saved(kind, layout):
    """Training keeps x and small maps, and the same bits come out every time."""
    fast, _ = KINDS[kind].pair(C)
    x = feature_map((2, C, 48, 48), layout, torch.float32).requires_grad_()
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        first = fast(x)
    assert saved.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(saved.values()) < 0.6 * x.nbytes  # a dozen values a pixel, of 24
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (first, fast.train()(x))]
    assert torch.equal(*grads)


@native
@pytest.mark.parametrize("kind", ["even", "channels"])
def test_compiled(kind):
    fast, plain = KINDS[kind].pair(8)
    x = feature_map((2, 8, 6, 5), "channels_last", torch.float32).requires_grad_()
    y = torch.compile(fast, fullgraph=True, backend="aot_eager")(x, residual=x, activation="relu")
    want = reference.epilogue(plain(x), x, "relu")
    found = [(v, *torch.autograd.grad(v.square().sum(), [x, *m.parameters()])) for v, m in ((y, fast), (want, plain))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@native
@layouts
@pytest.mark.parametrize("inputs", ["normal", "relu"])
def test_ops(inputs, layout):
    """Every op against its own reference: values and strides, with maxima first or counted."""
    x = INPUTS[inputs](feature_map((2, 8, 5, 3), layout, torch.float32)).contiguous(
        memory_format=catalogue.LAYOUTS[layout]
    )
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


@pytest.mark.parametrize("function", ["gate_channels", "gate_twice"])
@pytest.mark.parametrize("module", [vf.functional, reference], ids=["fast", "reference"])
def test_bad_input(function, module):
    call, gates = getattr(module, function), {"gate_channels": (lambda m: m,), "gate_twice": (None, lambda m: m[:, :1])}
    x = torch.ones(2, 8, 4, 4)
    call(x, *gates[function])
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\]"):
        call(x[0], *gates[function])
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


@targets
@pytest.mark.parametrize("k", [1, 3, 7])
def test_conv_maps(k, device, backend):
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
