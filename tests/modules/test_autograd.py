"""Derivatives: first and second order, frozen inputs, what is saved, autocast, op contracts."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import visattn_fast as vf
from cases import EPILOGUES, INTERPRETED, feature_map, oracle, poisoned, run, within_budget
from visattn_fast import catalogue, reference
from visattn_fast.ops.library import OPS

entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)
gated = pytest.mark.parametrize("entry", [e for e in catalogue.ENTRIES.values() if e.epilogue], ids=lambda e: e.name)
layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
# The others call a kernel several times, and see nothing of it that they do not see of another backend's.
OP_TESTS = (
    "test_schema"
    if INTERPRETED
    else ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
)
native_only = pytest.mark.skipif(INTERPRETED, reason="hundreds of evaluations, too slow in the interpreter")


def functional_call(module, epilogue=(None, None)):
    """``f(x, *parameters[, residual])`` of a module, for gradcheck."""
    names = [name for name, _ in module.named_parameters()]
    kwargs = {"activation": epilogue[1]} if epilogue[1] else {}

    def call(x, *tensors):
        parameters = dict(zip(names, tensors, strict=False))
        rest = {"residual": tensors[-1], **kwargs} if len(tensors) > len(names) else kwargs
        return torch.func.functional_call(module, parameters, (x,), rest)

    return call


def differentiated(entry, module):
    """The parameters, those aside that differences and the gradient of the original disagree on."""
    return [p.detach() if name in entry.partial_gradients else p for name, p in module.named_parameters()]


@native_only
@entries
@layouts
def test_gradcheck(entry, layout):
    fast, _ = entry.pair(4, torch.float64)
    x = feature_map((2, 4, 3, 3), layout, torch.float64).requires_grad_()
    inputs = (x, *differentiated(entry, fast))
    assert torch.autograd.gradcheck(functional_call(fast), inputs)
    assert torch.autograd.gradgradcheck(functional_call(fast), inputs, fast_mode=True)


@native_only
@gated
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES[1:])
def test_gradcheck_epilogue(entry, with_residual, activation):
    fast, _ = entry.pair(4, torch.float64)
    x = feature_map((1, 4, 3, 2), "nchw", torch.float64).requires_grad_()
    residual = [feature_map((1, 4, 3, 2), "nchw", torch.float64, seed=3).requires_grad_()] if with_residual else []
    call = functional_call(fast, (with_residual, activation))
    assert torch.autograd.gradcheck(call, (x, *differentiated(entry, fast), *residual))
    assert torch.autograd.gradgradcheck(call, (x, *differentiated(entry, fast), *residual), fast_mode=True)


@entries
def test_gradient_penalty(entry):
    """A gradient of a gradient's norm, as GANs take it, equals the reference's."""
    penalties = []
    dtype = torch.float64 if entry.has_torch_layers else torch.float32  # a batch norm of two values magnifies
    for module in entry.pair(8, dtype):
        x = feature_map((2, 8, 4, 4), "nchw", dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        penalties.append([x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-4)


@entries
def test_checkpoint(entry):
    """Recomputed in the backward pass, the same gradients come out."""
    fast, _ = entry.pair(8)
    gradients = []
    for call in (fast, functools.partial(checkpoint, fast, use_reentrant=False)):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float32).requires_grad_()
        gradients.append(torch.autograd.grad(call(x).square().sum(), [x, *fast.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@entries
def test_function_transforms(entry):
    """torch.func.grad gives the gradients of autograd, by the kernels where they are chosen explicitly.

    Running statistics go in as well: they are written to.
    """
    fast, _ = entry.pair(8)
    if (entry.has_torch_layers or entry.partial_gradients) and entry.training and list(fast.buffers()):
        pytest.skip("like PyTorch's own, this batch norm updates its statistics in place, which transforms refuse")
    x = feature_map((2, 8, 4, 4), "nchw", torch.float32)
    parameters = dict(fast.named_parameters())

    buffers = {name: b.clone() for name, b in fast.named_buffers()}

    def loss(x, parameters, buffers):
        return torch.func.functional_call(fast, (parameters, buffers), (x,)).square().sum()

    with vf.use_backend("triton" if INTERPRETED else "cpp"):
        dx, dparameters = torch.func.grad(loss, argnums=(0, 1))(x, parameters, buffers)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(fast(leaf).square().sum(), [leaf, *parameters.values()])
    torch.testing.assert_close((dx, *dparameters.values()), expected, rtol=1e-4, atol=1e-5)


@gated
def test_frozen_inputs(entry):
    """Only what asks for a gradient gets one, in either order."""
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


@entries
@layouts
def test_saved_for_backward(entry, layout):
    """Training keeps x, the parameters and small maps; never a second copy of x."""
    shape = (2, 64, 64, 64)
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    fast, _ = entry.pair(64)
    x = feature_map(shape, layout, torch.float32).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(x)
    if entry.has_torch_layers:
        pytest.skip("PyTorch's layers keep maps of their own")
    assert saved.pop(x.untyped_storage().data_ptr()) == x.nbytes
    for p in fast.parameters():
        saved.pop(p.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) <= entry.saved * x.nbytes


@entries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast(entry, dtype):
    """Under autocast x may come in either dtype and the parameters stay float32; the result has x's dtype."""
    fast, plain = entry.pair(32)
    x = feature_map((2, 32, 9, 9), "nchw", dtype)
    with torch.autocast("cpu", torch.bfloat16):
        fused, eager = run(fast, x), run(plain, x)
    assert fused["y"].dtype == dtype
    eager["y"] = eager["y"].to(dtype)  # gates come in bfloat16 from the eager module
    within_budget(fused, eager, *oracle(plain, x))


@gated
def test_mixed_dtypes(entry):
    """bfloat16 maps with float32 parameters work without autocast too; a wider residual widens the result."""
    fast, plain = entry.pair(32)
    x = feature_map((2, 32, 5, 5), "nchw", torch.bfloat16)
    residual = feature_map((2, 32, 5, 5), "nchw", torch.float32, seed=2)
    fused = run(fast, x, residual, "silu")  # smooth: y is rounded first, which would decide on which side of 0 it lies
    assert fused["y"].dtype == torch.float32
    assert fused["x"].dtype == torch.bfloat16
    with vf.use_backend("reference"):
        eager = run(fast, x, residual, "silu")
    within_budget(fused, eager, *oracle(plain, x, residual, "silu"))


@entries
def test_inputs_are_kept(entry):
    """Nothing writes to an input, and no result shares its memory."""
    fast, _ = entry.pair(8)
    x = feature_map((2, 8, 4, 4), "nchw", torch.float32)
    before = x.clone()
    with torch.no_grad():
        results = [fast(x)] + ([fast(x, residual=x, activation="relu")] if entry.epilogue else [])
    assert torch.equal(x, before)
    assert all(y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for y in results)


class _Recorder(TorchDispatchMode):
    """Records every call of one of our ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "visattn_fast":
            self.calls.append((func, [a.detach() if isinstance(a, torch.Tensor) else a for a in args]))
        return func(*args, **(kwargs or {}))


@entries
@layouts
@pytest.mark.parametrize("shape", [(2, 8, 5, 3), (0, 8, 5, 3), (2, 8, 1, 1)], ids=["plain", "empty", "1x1"])
def test_opcheck(entry, layout, shape):
    """Schema, fake (shapes, dtypes, strides) and dispatch of both directions, held against the reference op."""
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    fast, _ = entry.pair(8)
    x = feature_map(shape, layout, torch.float32).requires_grad_()
    with _Recorder() as recorder:
        fast(x).sum().backward()
        if entry.epilogue:
            fast(x, residual=x.detach(), activation="silu").sum().backward()
        with torch.no_grad():
            fast(x)
    expected = entry.ops or (f"{entry.name}_fwd", f"{entry.name}_bwd")
    expected += (f"{entry.name}_infer",) * (f"{entry.name}_infer" in OPS)
    assert {str(func) for func, _ in recorder.calls} == {f"visattn_fast.{op}.default" for op in expected}
    for func, args in recorder.calls:
        torch.library.opcheck(func, tuple(args), test_utils=OP_TESTS)
        with poisoned():
            kernel = func(*args)
        plain = OPS[func._opname].reference(*args)
        for got, want in zip(*map(tree_leaves, (kernel, plain)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert got.stride() == want.stride()


def test_reference_epilogue_is_what_it_says():
    y, r = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(reference.epilogue(y, r, "relu"), (y + r).relu())
    assert torch.equal(reference.epilogue(y), y)
