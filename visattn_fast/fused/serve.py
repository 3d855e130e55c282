"""The one way from a public function to its op: decide which backend serves, call it, apply the epilogue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import Decision, decide
from ..ops.autograd import FusedOp, Update, recorded
from ..reference.batch_norm import Norm, update_running_statistics
from ..reference.checks import ACTIVATIONS, RESHAPES, check_batch_norm, check_choice, check_residual
from ..reference.positions import as_before, as_map, is_signal_or_volume

_compiling = torch.compiler.is_compiling  # looked up once: a look-up at each call shows on small maps


def serve(
    op: FusedOp,
    tensors: tuple[Any, ...],
    *,
    check: Callable[..., None] | None = None,
    options: tuple[Any, ...] = (),
    residual: Tensor | None = None,
    activation: str | None = None,
    norm: Norm | None = None,
    plain: Callable[[], Tensor] | None = None,
    update: Update | None = None,
) -> Tensor:
    """Computes ``act(op(x, weights) + residual)`` with the backend that `decide` names, or with the op's plain form.

    Args:
        op: the op to call.
        tensors: x and the weights. For an op with an epilogue, x is ``[N, C, H, W]``; if all positions are alike to it,
            also ``[N, C, L]`` or ``[N, C, D, H, W]``.
        check: called with ``tensors``; raises unless they fit each other. None: the caller has checked them. Native
            kernels check what they get, in less time: then this is called only if they refuse, to say what is wrong.
        options: the op's numbers.
        residual: x's shape, or None; checked here.
        activation: None, ``"relu"`` or ``"silu"``; checked here.
        norm: a batch norm in eval mode to apply to x first.
        plain: takes the place of ``op.plain`` for an op that updates running statistics: it computes y without the
            epilogue and updates them itself.
        update: updates running statistics from the op's small results. Called once if the op serves.

    Returns:
        y; a residual of another dtype than x's promotes it.

    Raises:
        TypeError: a residual whose dtype is not floating-point.
        ValueError: a residual that does not fit x, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.
    """
    if op.over_positions and is_signal_or_volume(tensors[0]):
        x = tensors[0]
        check_residual(residual, x)
        on_map = functools.partial(serve, check=check, options=options, activation=activation, norm=norm)
        try:
            y = on_map(op, (as_map(x), *tensors[1:]), residual=None if residual is None else as_map(residual))
            return as_before(y, x)
        except ValueError as error:
            raise ValueError(f"{error}, made of {tuple(x.shape)}{RESHAPES.get(x.dim(), '')}") from None
    if norm is not None:
        z, *weights = tensors
        if check is not None:
            check(*tensors)
        check_batch_norm(z, *norm[:4], False, norm.eps)
        if op.normed is not None and norm_fuses_into_gate(op, z, (*tensors, residual, *norm[:4]), residual):
            code = check_epilogue(z, residual, activation)
            return op.normed(z, *norm, *weights, residual, code, *options)
        tensors = (norm.apply(z), *weights)
    rest = options, residual, activation, plain, update
    if check is None or _compiling():
        if check is not None:
            check(*tensors)
        return _serve(op, tensors, decide(tensors[0], op), *rest)
    try:
        decision = decide(tensors[0], op)
        if decision.backend != "cpp":
            check(*tensors)
        return _serve(op, tensors, decision, *rest)
    except (AttributeError, RuntimeError):
        check(*tensors)
        check_epilogue(tensors[0], residual, activation)
        raise


def _serve(
    op: FusedOp,
    tensors: tuple[Any, ...],
    decision: Decision,
    options: tuple[Any, ...],
    residual: Tensor | None,
    activation: str | None,
    plain: Callable[[], Tensor] | None,
    update: Update | None,
) -> Tensor:
    """Serves a call as decided; see `serve`."""
    x = tensors[0]
    nothing = residual is None and activation is None
    code = 0 if nothing or not op.epilogue else check_epilogue(x, residual, activation)
    if not decision.fused:
        y = op.plain(*tensors, *options) if plain is None else plain()
        return reference.epilogue(y, residual, activation) if op.epilogue else y
    call = op if update is None else functools.partial(op.call_and_update, update)
    if not op.epilogue:
        return call(*tensors, *options)[0]
    if residual is None or residual.dtype == x.dtype:
        return call(*tensors, residual, code, *options)[0]
    y = call(*tensors, None, 0, *options)[0]  # the op would round the sum to x's dtype
    return reference.epilogue(y, residual, ACTIVATIONS[code])


def check_epilogue(x: Tensor, residual: Tensor | None, activation: str | None) -> int:
    """Returns the activation's code. Raises unless residual and activation fit x."""
    code = check_choice("activation", activation, ACTIVATIONS)
    check_residual(residual, x)
    return code


def norm_fuses_into_gate(op: FusedOp, z: Tensor, tensors: Iterable[Any], residual: Tensor | None) -> bool:
    """True if one op computes a batch norm in eval mode and the gate after it: on CPUs, if nothing needs a gradient.

    Args:
        op: the gate.
        z: the input of the batch norm.
        tensors: every tensor from which the result is computed.
        residual: as in `serve`.
    """
    if torch.compiler.is_compiling() or (residual is not None and residual.dtype != z.dtype):
        return False
    return decide(z, op).backend == "cpp" and not recorded(tensors)


def serve_batch_norm(
    op: FusedOp,
    stateful: Callable[..., Tensor],
    maps: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    statistics: tuple[Tensor | None, Tensor | None],
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Computes what `serve` does, for a gate that contains a batch norm. Updates the running statistics in training.

    Args:
        op: ``(*maps, weight, bias, mean, var, ...) -> (y, mean, var)``; without a mean it uses the batch's statistics.
        stateful: ``(*maps, weight, bias, *statistics, training, momentum, eps) -> y`` in plain PyTorch. It updates the
            statistics itself.
        maps: the maps that the gate reads, x first; the batch norm is of the last.
        weight, bias, statistics, training, momentum, eps: the batch norm's arguments, as in `F.batch_norm`.
        residual, activation: as in `serve`.

    Returns:
        y, as in `serve`.
    """
    x, last = maps[0], maps[-1]

    def plain() -> Tensor:
        wide = last.dtype in (torch.float32, torch.float64)
        affine = (weight.to(last.dtype), bias.to(last.dtype)) if wide else (weight, bias)
        return stateful(*maps, *affine, *statistics, training, momentum, eps).to(x.dtype)

    given = maps
    if last.dtype != x.dtype and decide(x, op).fused:
        given = tuple(m.to(x.dtype) for m in maps)
    tensors = (*given, weight, bias, *((None, None) if training else statistics))

    def update(batch: Sequence[Tensor]) -> None:
        if x.shape[0]:
            mean, var = (t.detach() for t in batch)
            update_running_statistics(*statistics, mean, var, x.numel() // x.shape[1], momentum)

    return serve(
        op,
        tensors,
        options=(float(eps),),
        residual=residual,
        activation=activation,
        plain=plain,
        update=update if training else None,
    )
