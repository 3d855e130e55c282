"""Fused functions: the autograd node, the tensors it saves, and its first and second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import converted

# Looked up once: a look-up at each call takes as long as the call itself.
_compiling, _recording, _any_requires_grad = (
    torch.compiler.is_compiling,
    torch.is_grad_enabled,
    torch._C._any_requires_grad,
)
_exporting, _tracing = torch.compiler.is_exporting, torch._C._get_tracing_state
_overridden, _call_boxed = torch._C._has_torch_function, torch._C._dispatch_call_boxed
_is_batched, _is_legacy_batched = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor

Gradients = Callable[..., Sequence[Tensor | None]]
Update = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True, eq=False)
class FusedOp:
    """A public function's ops and autograd node, beside the same mathematics in plain PyTorch.

    `visattn_fast.backends.decide` says whether the ops serve a call; `visattn_fast.fused.serve` makes the call.

    Attributes:
        name: the stem of the family, as in the names of the ops.
        function: the autograd.Function, ``(*tensors, *options) -> (y, *small)``; options are numbers.
        plain: ``(*tensors, *options) -> y`` in plain PyTorch and in x's dtype, without residual and activation.
        epilogue: True if the tensors end in a residual, and the options begin with an activation's code.
        infer: the op that returns y alone, for CPU calls that keep nothing for a backward pass.
        normed: the op ``(z, *batch norm, *weights, residual, activation, *options) -> y``, for inference on CPUs.
        tiny: maps of at most so many pixels are left to ``plain`` by `torch.compile`: Inductor's code is faster there.
        pixels: the dimensions of x that are its height and width.
        compiled_plain: True if `torch.compile` always takes ``plain``.
        over_positions: True if the op treats all positions of a channel alike, so that signals and volumes are maps.
        in_torch: ``"cpu"`` or ``"all"``: devices on which the op is made of PyTorch's operations and needs no kernel.
    """

    name: str
    function: type[torch.autograd.Function]
    plain: Callable[..., Tensor]
    epilogue: bool = False
    infer: Callable[..., Tensor] | None = None
    normed: Callable[..., Tensor] | None = None
    tiny: int = 0
    pixels: tuple[int, int] = (2, 3)
    compiled_plain: bool = False
    over_positions: bool = False
    in_torch: str = ""

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """Calls the fused function. Returns all its results, or only y if an op for inference serves."""
        if recorded(args):
            return record(self.function, *args)
        # Under Dynamo the forward op serves: Inductor drops the results that are not used.
        if self.infer is not None and args[0].is_cpu and not _compiling():
            return (_call_op(self.infer, args),)
        return self.function.forward(*args)

    def call_and_update(self, update: Update, *args: Any) -> tuple[Tensor, ...]:
        """Calls the fused function, and ``update`` once with its small results. Only for ops without ``infer``."""
        if recorded(args) and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            args = tuple(_savable(args)) if _any_inference(args) else args  # `record` would update twice
            return record(updating(self.function), *args, update)
        results = self(*args)
        update(results[1:])
        return results


def recorded(arguments: Iterable[Any]) -> bool:
    """True if autograd would record a function of these arguments."""
    if not _recording():
        return False
    if _compiling():
        return any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return _any_requires_grad(*arguments)


def call_function(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """Calls ``function``. Makes an autograd node only if one of the arguments needs a gradient."""
    return record(function, *args) if recorded(args) else function.forward(*args)


def record(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    """Calls ``function.apply(*args)`` with the least overhead."""
    if torch.compiler.is_compiling():
        # Dynamo refuses the same tensor in two places, such as x that is also the residual: a view takes its place.
        again = [isinstance(a, Tensor) and any(a is b for b in args[:i]) for i, a in enumerate(args)]
        return function.apply(*(same_view(a) if twice else a for a, twice in zip(args, again, strict=True)))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # Function.apply first inspects forward's signature for defaults: 28 of 50 us a call, and there are none.
    apply: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    try:
        return apply(*args)
    except RuntimeError:
        if not _any_inference(args):
            raise
    return apply(*_savable(args))


def _any_inference(args: Iterable[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.is_inference() for a in args)


def _savable(args: Iterable[Any]) -> list[Any]:
    """Copies tensors made in inference mode, which autograd refuses to save: where PyTorch needs no x, it trains."""
    return [a.clone() if isinstance(a, Tensor) and a.is_inference() else a for a in args]


def in_autocast(x: Tensor) -> bool:
    """True if autocast is on for x's device. It does not know the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def mixed(mathematics: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """``mathematics(x, *arguments)`` in x's dtype. If dtypes differ outside autocast, all tensors are widened first.

    So are float16 tensors on CPUs, but not in exports: a sum over pixels, or the gradient of a gate, which is one, may
    be more than float16 holds, 65504.
    """
    tensors = [t for t in (x, *arguments) if isinstance(t, Tensor)]
    dtypes = {t.dtype for t in tensors}
    too_narrow = x.dtype == torch.float16 and x.is_cpu and not (_exporting() or _tracing())
    if (len(dtypes) == 1 and not too_narrow) or in_autocast(x):
        return mathematics(x, *arguments).to(x.dtype)
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return mathematics(*(t.to(widest) if isinstance(t, Tensor) else t for t in (x, *arguments))).to(x.dtype)


def in_dtype_of_x(mathematics: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps ``mathematics`` in `mixed`: it then takes weights of any dtype and returns x's."""

    def widened(x: Tensor, *arguments: Any) -> Tensor:  # Dynamo cannot trace a functools.partial here
        return mixed(mathematics, x, *arguments)

    return widened


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switches autocast off in ``function``, so that sums and gates stay in the accumulation dtype.

    The first argument of ``function`` is a tensor; autocast is switched off for its device.
    """

    @functools.wraps(function)
    def exact(x: Tensor, *args: Any) -> Any:
        if not in_autocast(x):
            return function(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return exact


def fused_function(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    gradients: Gradients,
    mathematics: Callable[..., Tensor],
    saves_result: bool = False,
    epilogue: bool = False,
    partial: bool = False,
) -> type[torch.autograd.Function]:
    """Makes an autograd.Function from a forward op and a backward op.

    It saves its tensor arguments and the forward op's small results, never a second copy of x. A backward pass that is
    itself recorded (``create_graph=True``) differentiates ``mathematics`` instead of calling the backward op.

    Args:
        name: the stem of the family; the class is named after it.
        forward: ``(*tensors, *options) -> (y, *small)``; options are numbers. If it calls several ops, decorate it with
            `without_autocast`, and ``gradients`` too.
        gradients: ``(grad, tensors, small, options)`` -> for each of ``tensors`` its gradient, in any dtype, or None. A
            gradient with fewer dimensions than its tensor means ``grad`` itself.
        mathematics: ``(*tensors, *options) -> y`` in differentiable PyTorch.
        saves_result: True if backward reads y (a small one): ``small`` then starts with it.
        epilogue: True if the tensors end in a residual, and the options begin with an activation's code. Without an
            activation the residual is not saved: its gradient is ``grad``.
        partial: True if ``gradients`` takes one more argument, which says for each of ``tensors`` whether its gradient
            is needed, because a gradient that is not would cost a pass over a map.
    """

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        tensors = [a for a in inputs if not isinstance(a, (int, float))]
        ctx.options, ctx.arity = inputs[len(tensors) :], len(tensors)
        if epilogue and not ctx.options[0]:
            tensors[-1] = None
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[0 if saves_result else 1 :])

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        found: Any
        unneeded = (None,) * len(ctx.options)
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them at every access
        tensors, small = saved[: ctx.arity], saved[ctx.arity :]
        if grad is None:
            return (None,) * ctx.arity + unneeded
        added = epilogue and not ctx.options[0] and ctx.needs_input_grad[ctx.arity - 1]
        if is_recorded_backward() or is_batched(grad):
            found = differentiate(ctx, mathematics, tensors, grad)
            return (*found[:-1], grad, *unneeded) if added else found + unneeded
        # One loop that only compares: most gradients fit, and on small maps each microsecond shows. Under Dynamo,
        # comparing strides would add guards.
        found = []
        fits = not torch.compiler.is_compiling()
        needs = (ctx.needs_input_grad,) if partial else ()
        for t, d in zip(tensors, gradients(grad, tensors, small, ctx.options, *needs), strict=True):
            if t is None or d is None:
                found.append(None)
            else:
                found.append(d)
                fits = fits and d.dtype is t.dtype and d.stride() == t.stride()
        if not fits:
            found = _fitted(found, tensors, grad)
        if added:
            found[-1] = grad
        return *found, *unneeded

    methods: dict[str, Callable[..., Any]] = {"forward": forward, "setup_context": setup_context, "backward": backward}
    static = {key: staticmethod(method) for key, method in methods.items()}
    return type(f"{name}_function", (torch.autograd.Function,), static)


def _fitted(found: list[Tensor | None], tensors: Sequence[Any], grad: Tensor) -> list[Tensor | None]:
    """Puts ``grad`` in the place of gradients with too few dimensions; then gives each its tensor's dtype and strides.

    Only dimensions of size 1 change their stride: a 1x1 convolution's weight in channels_last has others than a
    contiguous gradient, and DistributedDataParallel would warn and copy.
    """
    found = [None if d is None else grad if d.dim() < t.dim() else d for t, d in zip(tensors, found, strict=True)]
    found = converted(found, [None if t is None else t.dtype for t in tensors])
    if torch.compiler.is_compiling():
        return found
    pairs = zip(tensors, found, strict=True)
    return [_strided_like(d, t) if d is not None and 1 in d.shape else d for t, d in pairs]


def _strided_like(d: Tensor, t: Tensor) -> Tensor:
    """Returns a view of d in which the dimensions of size 1 have the strides of t. Both have the same shape."""
    strides = [other if size == 1 else own for size, own, other in zip(d.shape, d.stride(), t.stride(), strict=True)]
    return d.as_strided(d.shape, strides)


@functools.cache
def updating(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Makes ``function`` take one more argument, last, which its forward calls with the small results.

    A checkpoint stops the recomputation as soon as autograd has saved the last tensor, which it does after forward.
    Running statistics are updated in both runs only if forward itself updates them, as PyTorch's batch norm does.
    """
    base: Any = function

    def forward(*args: Any) -> tuple[Tensor, ...]:
        results = base.forward(*args[:-1])
        args[-1](results[1:])
        return results

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        base.setup_context(ctx, inputs[:-1], output)

    def backward(ctx: Any, *grads: Any) -> Any:
        return *base.backward(ctx, *grads), None

    methods: dict[str, Callable[..., Any]] = {"forward": forward, "setup_context": setup_context, "backward": backward}
    static = {key: staticmethod(method) for key, method in methods.items()}
    return type(base.__name__, (torch.autograd.Function,), static)


def is_recorded_backward() -> bool:
    """True if this backward pass may itself be differentiated. A compiled one never is, although it records."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def same_view(x: Tensor) -> Tensor:
    """Returns a view with the same strides.

    ``x.view_as(x)`` gives one image in channels_last another batch stride, with which PyTorch's batch norm (2.13)
    computes a wrong gradient.
    """
    return x[...]


def is_batched(grad: Tensor) -> bool:
    """True if a backward pass has several gradients at once, ``is_grads_batched``, for which ops have no rules."""
    return not torch.compiler.is_compiling() and (_is_legacy_batched(grad) or _is_batched(grad))


def differentiate(
    ctx: Any, mathematics: Callable[..., Tensor], tensors: Iterable[Any], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``mathematics(*tensors, *ctx.options)``; None for tensors that need none, or are None.

    They are differentiable if this backward pass is recorded.
    """
    tensors, recorded = list(tensors), torch.is_grad_enabled()
    needs = [t is not None and needed for t, needed in zip(tensors, ctx.needs_input_grad, strict=False)]
    with torch.enable_grad():
        # One tensor may have been computed from another: as views, each gets only the gradient of its own place.
        tensors = [same_view(t) if needed else t for t, needed in zip(tensors, needs, strict=True)]
        y = mathematics(*tensors, *ctx.options)
        wanted = [t for t, needed in zip(tensors, needs, strict=True) if needed]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=recorded) if wanted else ())
    return tuple(next(found) if needed else None for needed in needs)


def _call_op(op: Any, args: tuple[Any, ...]) -> Any:
    """Calls ``op``, directly in the dispatcher unless an argument overrides it: on small maps the difference shows."""
    return op(*args) if _overridden(args) else _call_boxed(op._handle, *args)
