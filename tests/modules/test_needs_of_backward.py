"""Fused modules keep for the backward pass, and compute in it, no more than needed, for any kind of gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import visattn_fast as vf
from cases import RecordedOps, entries, layouts, with_epilogue
from sequences import build_variant, inputs, variants
from visattn_fast.catalogue import ENTRIES, LAYOUTS, feature_map
from visattn_fast.measure.memory import saved_bytes

SHAPE = (2, 12, 5, 4)


def result(module: nn.Module, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    y = module(*tensors, **options)
    return y[0] if isinstance(y, tuple) else y


def layers(entry: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Returns the fused module, the plain one and an input, in float64."""
    shape = next(s for s in (SHAPE, (2, 16, 8, 8), (2, 48, 14, 14)) if entry.supports(s))
    return *entry.pair(shape[1], torch.float64), feature_map(shape, dtype=torch.float64)


def _gated(x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
    return vf.functional.gate_channels(x, torch.sigmoid, **epilogue)


def _gated_twice(x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
    gates = (lambda mean, top: (mean + top).sigmoid(), lambda maps: maps.mean(1, keepdim=True).sigmoid())
    return vf.functional.gate_twice(x, *gates, **epilogue)


EPILOGUES: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
    **{name: functools.partial(lambda e: e.pair(12, torch.float64)[0], e) for name, e in ENTRIES.items() if e.epilogue},
    "gate_channels": lambda: _gated,
    "gate_twice": lambda: _gated_twice,
}


@pytest.mark.interpreted
@layouts
@pytest.mark.parametrize("name", EPILOGUES)
def test_residual_without_activation_is_not_kept(name, layout):
    """Its gradient is that of the result, also in a second derivative. With an activation it is kept."""
    gate = EPILOGUES[name]()
    parameters = list(gate.parameters()) if isinstance(gate, nn.Module) else []
    x = feature_map(SHAPE, layout, torch.float64).requires_grad_()
    residual = feature_map(SHAPE, layout, torch.float64).requires_grad_()

    def kept(**epilogue: Any) -> int:
        return saved_bytes(lambda: gate(x, **epilogue), parameters)

    assert kept(residual=residual) == kept()
    assert kept(residual=residual, activation="relu") >= kept() + residual.nbytes
    y = gate(x, residual=residual)
    dy = torch.randn_like(y).requires_grad_()
    (alone,) = torch.autograd.grad(y, residual, dy, retain_graph=True)
    assert torch.equal(alone, dy)
    dx, dresidual = torch.autograd.grad(y, [x, residual], dy, create_graph=True)
    assert torch.equal(dresidual, dy)
    (want,) = torch.autograd.grad(gate(x), x, dy)
    torch.testing.assert_close(dx, want, rtol=1e-9, atol=1e-9)
    (second,) = torch.autograd.grad(dresidual.sum() + dx.sum() * 0, dy)
    assert torch.equal(second, torch.ones_like(dy))
    with torch.no_grad():
        for p in parameters:
            p.requires_grad_(False)
    (alone,) = torch.autograd.grad(gate(x.detach(), residual=residual), residual, dy)
    assert torch.equal(alone, dy)


def trains(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(result(module, x).square().sum(), parameters, allow_unused=True))


@entries
def test_inputs_made_in_inference_mode_train_where_the_plain_module_does(entry):
    """Gradients and running statistics are those of the same values in an ordinary tensor."""
    fast, plain, x = layers(entry)
    if not list(fast.parameters()):
        pytest.skip("has nothing to train")
    with torch.inference_mode():
        made = x.clone()
    want, state = trains(plain, x), plain.state_dict()
    if entry.name.startswith(("bam", "sk", "map_attention")):  # PyTorch's convolutions over x save it, in both
        for module in (fast, plain):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
                trains(module, made)
        return
    got = trains(fast, made)
    for a, b in zip((*got, *fast.state_dict().values()), (*want, *state.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    ours, original = fast.requires_grad_(False), plain.requires_grad_(False)
    assert torch.equal(result(ours, made), result(ours, x))
    if entry.epilogue:
        shift = torch.zeros_like(x, requires_grad=True)
        result(ours, made, residual=shift).sum().backward()
        assert torch.equal(shift.grad, torch.ones_like(x))
    assert not result(original, made).requires_grad


# Composed gates -> the op that computes the gradient of the map, alone or in its last part.
INPUT_GRADIENTS = {
    "soca": ("channel_input_grad", "channel_covariance_bwd", "soca_gate_bwd"),
    "coord_att": ("axis_input_grad",),
    "triplet_attention": ("triplet_input_grad",),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", INPUT_GRADIENTS)
def test_frozen_input_costs_no_pass(name, activation):
    """The gradients of the parameters are the same as with an input that needs one."""
    entry = ENTRIES[name]
    fast, _, x = layers(entry)
    residual = feature_map(x.shape, dtype=torch.float64).requires_grad_()
    found = []
    for needed in (True, False):
        with RecordedOps() as recorded:
            y = fast(x.clone().requires_grad_(needed), residual=residual, activation=activation)
            found.append(torch.autograd.grad(y.square().sum(), [*fast.parameters(), residual]))
        assert set(INPUT_GRADIENTS[name]) & set(recorded.names) == (set(INPUT_GRADIENTS[name]) if needed else set())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.interpreted
def test_frozen_branches_cost_no_pass():
    """The same for selective kernels and split attention, whose maps are not the module's input."""
    sk, (v1, v2) = ENTRIES["sk"].pair(16, torch.float64)[0], (feature_map((2, 16, 5, 4), dtype=torch.float64),) * 2
    w1, w2 = (torch.randn(r, 4, dtype=torch.float64, requires_grad=True) for r in (4, 12))
    u = feature_map((2, 12, 5, 4), dtype=torch.float64)
    calls = {
        "branch_grad": (lambda v: vf.functional.sk(v, v2, *sk.weights(), **sk.norm_step()), v1, list(sk.parameters())),
        "shift_grad": (lambda v: vf.functional.split_attention(v, w1, w2), u, [w1, w2]),
    }
    for op, (call, v, weights) in calls.items():
        found = []
        for needed in (True, False):
            with RecordedOps() as recorded:
                y = call(v.clone().requires_grad_(needed))
                found.append(torch.autograd.grad(y.square().sum(), weights, allow_unused=True))
            assert (op in recorded.names) == needed
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@layouts
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@entries
def test_batched_gradients(entry, training, layout):
    """``is_grads_batched``, and the vectorized Jacobian, which calls it."""
    fast, plain, x = layers(entry)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    found = []
    for module in (fast.train(training), plain.train(training)):
        leaf = x.clone().requires_grad_()
        y = result(module, leaf)
        grads = torch.randn((3, *y.shape), dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        wanted = [leaf, *module.parameters()]
        batched = torch.autograd.grad(y, wanted, grads, is_grads_batched=True, allow_unused=True)
        assert not any(t is not None and t.requires_grad for t in batched)
        found.append(batched)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    few = x[:, :, :2, :2] if entry.supports((2, x.shape[1], 2, 2)) else x
    got, want = (jacobian(lambda v, m=m: result(m, v).flatten()[:5], few, vectorize=True) for m in (fast, plain))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@with_epilogue
def test_batched_gradients_of_the_epilogue(entry):
    fast, _, x = layers(entry)
    found = []
    for batched in (True, False):
        tensors = [t.clone().requires_grad_() for t in (x, 0.5 * x)]
        for activation in (None, "silu"):
            y = fast.eval()(tensors[0], residual=tensors[1], activation=activation)
            grads = torch.randn((3, *y.shape), dtype=y.dtype, generator=torch.Generator().manual_seed(0))
            if batched:
                found.append(torch.autograd.grad(y, tensors, grads, is_grads_batched=True))
            else:
                each = [torch.autograd.grad(y, tensors, g, retain_graph=True) for g in grads]
                found.append(tuple(torch.stack(gs) for gs in zip(*each, strict=True)))
    for got, want in zip(found[:2], found[2:], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@entries
def test_mixed_dtypes_on_the_meta_device(entry, backend, dtypes):
    """Shapes and dtypes are those of the CPU, which autocast knows."""
    fast, _, x = layers(entry)
    x = x.to(dtypes[0])
    fast.to(dtypes[1]).eval()
    with vf.use_backend(backend):
        try:
            want = result(fast, x)
        except RuntimeError as error:
            pytest.skip(f"PyTorch's layers take one dtype: {error}")
        got = result(fast.to("meta"), x.to("meta"))
    assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


@pytest.mark.parametrize("need_weights", [True, False])
@variants
def test_sequences_on_the_meta_device(variant, need_weights):
    """The sequence modules have one dtype; they ask for autocast all the same."""
    for module in build_variant(variant):
        tensors = inputs(variant)
        want = module(*tensors, need_weights=need_weights)[0]
        got = module.to("meta")(*(t.to("meta") for t in tensors), need_weights=need_weights)[0]
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "meta")


@layouts
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@entries
def test_second_derivatives_of_a_single_image(entry, training, layout):
    """A view with other strides made PyTorch's batch norm compute a wrong gradient of one image in channels_last."""
    fast, plain, x = layers(entry)
    if training and entry.name.startswith(("bam", "sk")):
        pytest.skip("its batch norm takes several images in training")
    x = x[:1].contiguous(memory_format=LAYOUTS[layout])
    found = []
    for module in (fast.train(training), plain.train(training)):
        leaf = x.clone().requires_grad_()
        y = result(module, leaf)
        grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        (dx,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.square().sum(), leaf)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@entries
def test_both_layouts_call_the_same_layers(entry, monkeypatch):
    """A layer whose weights are read is called in neither."""
    called: list[nn.Module] = []
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm2d):
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, f=forward: called.append(self) or f(self, x))
    fast, _, x = layers(entry)
    seen = []
    for form in (torch.contiguous_format, torch.channels_last):
        called.clear()
        fast(x.contiguous(memory_format=form))
        seen.append([n for n, m in fast.named_modules() if m in called])
    assert seen[0] == seen[1]
