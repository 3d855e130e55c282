"""Gates that treat all positions of a channel alike take signals [N, C, L] and volumes [N, C, D, H, W] as well."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from visattn_fast import catalogue, reference
from visattn_fast.backends import backends

GATES = ("se", "eca", "simam", "scse", "channel_attention", "grn")
EPILOGUE = [name for name in GATES if catalogue.ENTRIES[name].epilogue]
OTHERS = [name for name in catalogue.ENTRIES if name not in GATES]
SHAPES = {"signal": (2, 8, 11), "volume": (2, 8, 3, 5, 4)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
gates = pytest.mark.parametrize("name", GATES)
channels_last = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def values(shape, last=False, seed=0, dtype=torch.float64):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def as_map(x):
    return x.flatten(2)[:, :, None]


@gates
@shapes
@channels_last
def test_values_and_gradients_are_those_of_a_map(name, shape, last):
    """Results have the form and the strides of x."""
    fast, plain = catalogue.ENTRIES[name].pair(8, torch.float64)
    x = values(shape, last).requires_grad_()
    found = []
    for module in (fast, plain):
        y = module(x)
        grad = values(tuple(y.shape), last, seed=1)
        found.append((y, *torch.autograd.grad(y, [x, *module.parameters()], grad)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
    flat = as_map(x.detach()).requires_grad_()
    y = plain(flat)
    torch.testing.assert_close(found[0][0].flatten(2), y.flatten(2))
    if name != "channel_attention":
        assert found[0][0].stride() == x.stride()
    (dx,) = torch.autograd.grad(y, flat, as_map(grad))
    torch.testing.assert_close(found[0][1].flatten(2), dx.flatten(2))
    assert found[0][1].stride() == x.stride()


@gates
@shapes
def test_no_position_is_copied(name, shape):
    """Views of x reach the op, in both layouts."""
    fast, _ = catalogue.ENTRIES[name].pair(8)
    for last in (False, True):
        x = values(shape, last, dtype=torch.float32)
        with torch.no_grad(), torch.profiler.profile() as profiler:
            fast(x)
        assert not {"aten::copy_", "aten::clone"} & {event.key for event in profiler.key_averages()}


@shapes
@pytest.mark.parametrize("name", EPILOGUE)
def test_residual_and_activation(name, shape):
    fast, plain = catalogue.ENTRIES[name].pair(8, torch.float64)
    x, residual = values(shape), values(shape, seed=1)
    torch.testing.assert_close(fast(x, residual=residual, activation="relu"), torch.relu(plain(x) + residual))
    with pytest.raises(ValueError, match="residual must have"):
        fast(x, residual=residual[:, :, :1])


@gates
@shapes
@channels_last
def test_attention_has_the_dimensions_of_x(name, shape, last):
    """Gates multiply x as they are."""
    fast, _ = catalogue.ENTRIES[name].pair(8, torch.float64)
    x = values(shape, last)
    found = fast.attention(x)
    assert {gate.dim() for gate in found.values()} == {x.dim()}
    if name == "scse":
        torch.testing.assert_close(x * sum(found.values()), fast(x))
    elif name == "grn":
        bias = fast.bias.view(-1, *[1] * (x.dim() - 2))
        torch.testing.assert_close(x * found["channel"] + bias, fast(x))
    elif name != "channel_attention":
        torch.testing.assert_close(x * next(iter(found.values())), fast(x))


@shapes
@pytest.mark.parametrize("trained", [False, True], ids=["eval", "train"])
def test_layers_that_are_not_as_built_are_called(shape, trained):
    """The passes over x are fused all the same."""
    fast, plain = (m.train(trained) for m in catalogue.ENTRIES["se"].pair(8, torch.float64))
    for module in (fast, plain):
        module.fc[1] = torch.nn.Tanh()
    torch.testing.assert_close(fast(values(shape)), plain(values(shape)))


@shapes
def test_gates_of_users(shape):
    x, residual = values(shape), values(shape, seed=1)
    found = vf.functional.gate_channels(x, torch.sigmoid, residual=residual, activation="silu")
    want = reference.gate_channels(x, torch.sigmoid) + residual
    torch.testing.assert_close(found, torch.nn.functional.silu(want))


@shapes
def test_batch_norm_before_the_gate(shape):
    """Statistics are of channels, whatever the dimensions."""
    se, _ = catalogue.ENTRIES["se"].pair(8, torch.float64)
    x = values(shape)
    statistics = [values((8,), seed=s).abs() + 0.5 for s in range(4)]
    norm = vf.functional.Norm(*statistics, 1e-5)
    with torch.no_grad():
        got = vf.functional.se(x, *se.weights(), norm=norm)
    want = vf.reference.se(norm.apply(as_map(x)), *se.weights())
    torch.testing.assert_close(got.flatten(2), want.flatten(2))


@gates
@shapes
def test_export_and_compile(name, shape):
    fast, plain = catalogue.ENTRIES[name].pair(8)
    x = values(shape, dtype=torch.float32)
    program = torch.export.export(fast, (x,))
    torch.testing.assert_close(program.module()(x), plain(x))
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), plain(x))


@pytest.mark.parametrize("kind", ["reference", *(["cpp"] if backends("cpu")["cpp"].available else [])])
@pytest.mark.parametrize("name", [*GATES, *OTHERS])
def test_other_dimensions_raise(name, kind):
    """Modules that look at neighbours take maps alone; no module takes a matrix, or a volume without positions."""
    fast, plain = catalogue.ENTRIES[name].pair(16)
    sizes = [(2, 16), (2, 16, 0), (2, 16, 2, 0, 3)] + [(2, 16, 6), (2, 16, 2, 6, 5)] * (name in OTHERS)
    for module in (fast, plain):
        for size in sizes:
            with vf.use_backend(kind), pytest.raises(ValueError, match="x must have"):
                module(torch.zeros(size))
