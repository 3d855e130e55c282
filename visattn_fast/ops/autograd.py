"""The autograd.Function of a fused op: when it is used, what it saves, how it is differentiated, once and twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .layout import converted

Gradients = Callable[..., tuple[Tensor | None, ...]]

# Asked at every call. Looking them up takes as long as calling them.
_overridden, _call_boxed = torch._C._has_torch_function, torch._C._dispatch_call_boxed


def mixed(mathematics: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """``mathematics(x, *arguments)`` in x's dtype, where x and weights may differ in dtype outside of autocast too."""
    tensors = [t for t in (x, *arguments) if isinstance(t, Tensor)]
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) == 1 or torch.is_autocast_enabled(x.device.type):
        return mathematics(x, *arguments).to(x.dtype)
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return mathematics(*(t.to(widest) if isinstance(t, Tensor) else t for t in (x, *arguments))).to(x.dtype)


def recorded(arguments: Iterable[Any]) -> bool:
    """Whether a gradient can be asked for of what is computed from these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def run(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """The results of a fused function. An autograd node is made only where a gradient can be asked for.

    Where none can, of a function with an op for inference there is only the first.
    """
    if not recorded(args):
        # Dynamo cannot ask a Function whether it has an attribute.
        infer = None if torch.compiler.is_compiling() or not args[0].is_cpu else getattr(function, "infer", None)
        return function.forward(*args) if infer is None else (_called(infer, args),)
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places, as x is where it is the residual, too.
        return function.apply(*(_again(a) if any(a is b for b in args[:i]) else a for i, a in enumerate(args)))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # Function.apply first inspects forward's signature for defaults, which it has not: 28 of 50 us a call.
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _called(op: Any, args: tuple[Any, ...]) -> Any:
    """``op(*args)``. Where nothing overrides it, the dispatcher is asked at once: small maps notice."""
    return op(*args) if _overridden(args) else _call_boxed(op._handle, *args)


def _again(a: Any) -> Any:
    return a.view_as(a) if isinstance(a, Tensor) else a


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose first argument is a tensor, with autocast off: sums and gates stay in the wide dtype."""

    @functools.wraps(function)
    def exact(x: Tensor, *args: Any) -> Any:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast knows no meta device
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return exact


def fused_function(
    name: str,
    forward_op: Callable[..., tuple[Tensor, ...]],
    gradients: Gradients,
    mathematics: Callable[..., Tensor],
    saves_result: bool = False,
    infer: Callable[..., Tensor] | None = None,
) -> type[torch.autograd.Function]:
    """Makes an autograd.Function of a forward op and a backward op.

    It saves its tensor arguments and the op's small results, never another copy of x. A backward pass that is itself
    recorded (``create_graph=True``) differentiates ``mathematics`` instead of calling the backward op.

    Args:
        name: of the class.
        forward_op: ``(*tensors, *options) -> (y, *small)``; options are numbers. A function of several ops, instead
            of one op, is made `without_autocast`, and so are its gradients.
        gradients: ``(grad, tensors, small, options)`` -> a gradient for each of ``tensors``, in any dtype, or None; a
            vector for a map stands for ``grad`` itself.
        mathematics: ``(*tensors, *options) -> y`` in differentiable PyTorch.
        saves_result: y is small and needed as well: ``small`` starts with it.
        infer: an op that returns y alone; see `run`.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensors = [a for a in inputs if not isinstance(a, (int, float))]
        ctx.options, ctx.arity = inputs[len(tensors) :], len(tensors)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[0 if saves_result else 1 :])

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        unneeded = (None,) * len(ctx.options)
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes it at every access
        tensors, small = saved[: ctx.arity], saved[ctx.arity :]
        if grad is None:
            return (None,) * ctx.arity + unneeded
        # A compiled backward pass is traced with gradients enabled, yet is never differentiated.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(ctx, mathematics, tensors, grad) + unneeded
        found = [
            None if t is None or d is None else grad if d.dim() < t.dim() else d
            for t, d in zip(tensors, gradients(grad, tensors, small, ctx.options), strict=True)
        ]
        return *converted(found, [None if t is None else t.dtype for t in tensors]), *unneeded

    methods: dict[str, Callable[..., Any]] = {
        "forward": forward_op,
        "setup_context": setup_context,
        "backward": backward,
    }
    static = {key: staticmethod(method) for key, method in methods.items()}
    return type(name, (torch.autograd.Function,), {**static, "infer": infer})


def _differentiable(
    ctx: Any, mathematics: Callable[..., Tensor], tensors: Any, grad: Tensor
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[: len(tensors)]
    with torch.enable_grad():
        # Of one tensor another may have been made, by way of which no gradient is to come here: views cut it off.
        tensors = [t.view_as(t) if needed else t for t, needed in zip(tensors, needs, strict=True)]
        y = mathematics(*tensors, *ctx.options)
        wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)
