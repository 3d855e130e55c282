"""Derivatives of the fused modules: finite differences, second order, checkpoints, frozen inputs, saved tensors."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import EPILOGUES, entries, feature_map, layouts, run, with_epilogue
from visattn_fast import catalogue

IN_TRAINING = [e for e in catalogue.ENTRIES.values() if f"{e.name}_eval" in catalogue.ENTRIES]  # with a batch norm


def functional_call(module, epilogue=(None, None)):
    """Returns ``f(x, *parameters[, residual])`` of a module, for gradcheck."""
    names = [name for name, _ in module.named_parameters()]
    kwargs = {"activation": epilogue[1]} if epilogue[1] else {}

    def call(x, *tensors):
        parameters = dict(zip(names, tensors, strict=False))
        rest = {"residual": tensors[-1], **kwargs} if len(tensors) > len(names) else kwargs
        return torch.func.functional_call(module, parameters, (x,), rest)

    return call


def differentiated(entry, module):
    """Returns the parameters; those whose gradient leaves a part out, unlike finite differences, are detached."""
    return [p.detach() if name in entry.partial_gradients else p for name, p in module.named_parameters()]


@entries
@layouts
def test_both_orders_match_finite_differences(entry, layout):
    fast, _ = entry.pair(4, torch.float64)
    x = feature_map((2, 4, 3, 3), layout, torch.float64).requires_grad_()
    inputs = (x, *differentiated(entry, fast))
    assert torch.autograd.gradcheck(functional_call(fast), inputs)
    assert torch.autograd.gradgradcheck(functional_call(fast), inputs, fast_mode=True)


@with_epilogue
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES[1:])
def test_both_orders_of_epilogues_match_finite_differences(entry, with_residual, activation):
    fast, _ = entry.pair(4, torch.float64)
    x = feature_map((1, 4, 3, 2), "nchw", torch.float64).requires_grad_()
    residual = [feature_map((1, 4, 3, 2), "nchw", torch.float64, seed=3).requires_grad_()] if with_residual else []
    call = functional_call(fast, (with_residual, activation))
    assert torch.autograd.gradcheck(call, (x, *differentiated(entry, fast), *residual))
    assert torch.autograd.gradgradcheck(call, (x, *differentiated(entry, fast), *residual), fast_mode=True)


@pytest.mark.interpreted
@entries
def test_gradient_penalty_matches_reference(entry):
    """The gradient of a gradient's norm, as GANs use it, equals that of the reference."""
    penalties = []
    dtype = torch.float64 if entry.has_torch_layers else torch.float32  # a batch norm of two values magnifies rounding
    for module in entry.pair(8, dtype):
        x = feature_map((2, 8, 4, 4), "nchw", dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        penalties.append([x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreted
@entries
def test_checkpoint_gives_the_same_gradients(entry):
    """A forward pass recomputed in the backward pass gives the same gradients, bit for bit."""
    fast, _ = entry.pair(8)
    gradients = []
    for call in (fast, functools.partial(checkpoint, fast, use_reentrant=False)):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float32).requires_grad_()
        gradients.append(torch.autograd.grad(call(x).square().sum(), [x, *fast.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def batch_norms(module, momentum):
    """Sets the momentum of the batch norms in training mode, and returns them."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        norm.momentum = momentum
    return norms


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("entry", "momentum"),
    [*((e, 0.1) for e in catalogue.ENTRIES.values()), *((e, None) for e in IN_TRAINING)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "early stop"])
@pytest.mark.parametrize("last", [True, False], ids=["last", "inside"])
def test_checkpoint_matches_reference(entry, momentum, reentrant, last):
    """A checkpoint gives the reference's gradients and running statistics, and counts a batch in both of its runs.

    The recomputation stops early, before a module that is last in the segment returns.
    """
    found = []
    for module in entry.pair(8, torch.float64):
        norms = batch_norms(module, momentum)
        segment = module if last else lambda x, module=module: module(x).sin()
        for seed in (0, 1):
            x = feature_map((2, 8, 4, 4), "nchw", torch.float64, seed=seed).requires_grad_()
            checkpoint(segment, x, use_reentrant=reentrant).square().sum().backward()
        assert all(norm.num_batches_tracked == 4 for norm in norms)
        found.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("entry", IN_TRAINING, ids=lambda e: e.name)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_need_not_be_counted(entry, momentum):
    """Without a count of batches, momentum serves; without both, running statistics stay, as in `nn.BatchNorm2d`."""
    found = []
    for module in entry.pair(8, torch.float64):
        for norm in batch_norms(module, momentum):
            norm.num_batches_tracked = None
        before = [b.clone() for b in module.buffers()]
        module(feature_map((2, 8, 4, 4), "nchw", torch.float64))
        found.append(list(module.buffers()))
        assert all(torch.equal(*pair) == (momentum is None) for pair in zip(before, found[-1], strict=True))
    torch.testing.assert_close(*found)


@pytest.mark.interpreted
@with_epilogue
def test_only_inputs_that_require_a_gradient_get_one(entry):
    fast, plain = entry.pair(8)
    x = feature_map((2, 8, 4, 4), "nchw", torch.float32)
    expected = run(plain, x)
    fast.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    grad = catalogue.feature_map((2, 8, 4, 4), seed=1)
    fast(leaf).backward(grad)
    torch.testing.assert_close(leaf.grad, expected["x"])
    assert all(p.grad is None for p in fast.parameters())
    fast.requires_grad_(True)
    if list(fast.parameters()):
        fast(x).backward(grad)
    for name, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    fast.requires_grad_(False)
    residual = x.clone().requires_grad_()
    fast(x, residual=residual).backward(grad)
    torch.testing.assert_close(residual.grad, grad)
    assert not fast(x).requires_grad


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "entry", [e for e in catalogue.ENTRIES.values() if not e.has_torch_layers], ids=lambda e: e.name
)  # PyTorch's layers save maps of their own
@layouts
def test_forward_saves_no_second_copy_of_x(entry, layout):
    """Training saves x, the parameters and small maps."""
    fast, _ = entry.pair(64)
    x = feature_map((2, 64, 64, 64), layout, torch.float32).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(x)
    assert saved.pop(x.untyped_storage().data_ptr()) == x.nbytes
    for p in fast.parameters():
        saved.pop(p.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) <= entry.saved * x.nbytes
