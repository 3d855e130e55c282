"""Coordinate attention, fused."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops.autograd import mixed
from ..ops.coord_att import COORD_ATT
from ..reference.as_built import as_built
from ..reference.batch_norm import batch_norm_step, update_running_statistics
from ..reference.checks import check_coordinate_gates
from .calls import call_layers
from .serve import check_epilogue, serve

__all__ = ["FastCoordAtt", "coord_att"]


def coord_att(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Coordinate attention: ``act(x * sigmoid(w_w a_w + b_w) * sigmoid(w_h a_h + b_h) + residual)``.

    ``[a_h, a_w] = hardswish(bn(w1 m + b1))``. m holds x's means over W, one for each row, followed by its means over H,
    one for each column.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: weight ``[M, C]`` (or, as a 1x1 convolution, ``[M, C, 1, 1]``) and bias ``[M]`` or None.
        bn_weight, bn_bias, running_mean, running_var: parameters and statistics of the batch norm, ``[M]`` or None.
        w_h, b_h, w_w, b_w: weight ``[C, M]`` (or ``[C, M, 1, 1]``) and bias ``[C]`` or None.
        training: normalise with the batch's statistics, and update the running ones, if given, in place.
        momentum: weight of this batch in the running statistics; 0: they stay as they are.
        eps: added to the variance.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation, no running statistics outside training.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Hou et al., "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021.
    """
    norm, statistics = (w1, b1, bn_weight, bn_bias), (running_mean, running_var)
    gates = (w_h, b_h, w_w, b_w)
    check_coordinate_gates(x, *norm, *statistics, *gates, training)

    def plain() -> Tensor:
        with _widened(statistics, (x, *norm, *gates)) as wide:  # `mixed` may cast, and then updates the copies
            return mixed(reference.coord_att, x, *norm, *wide, *gates, training, momentum, eps)

    tensors = (x, *norm, *((None, None) if training else statistics), *gates)
    count = x.shape[0] * (x.shape[2] + x.shape[3])

    def update(small: Sequence[Tensor]) -> None:
        update_running_statistics(running_mean, running_var, small[-2], small[-1], count, momentum)

    return serve(
        COORD_ATT,
        tensors,
        options=(float(eps),),
        residual=residual,
        activation=activation,
        plain=plain,
        update=update if training and count else None,
    )


@contextmanager
def _widened(
    statistics: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]
) -> Iterator[tuple[Tensor | None, ...]]:
    """The statistics in the widest dtype of all arguments. Changes made to them are copied back to the given ones."""
    dtypes = (t.dtype for t in (*statistics, *others) if t is not None)
    dtype = functools.reduce(torch.promote_types, dtypes)
    wide = tuple(None if s is None else s.to(dtype) for s in statistics)
    yield wide
    for given, changed in zip(statistics, wide, strict=True):
        if given is not None and changed is not None and given.dtype != dtype:
            given.copy_(changed)


class FastCoordAtt(reference.CoordAtt):
    """Fused `reference.CoordAtt`: same constructor, same ``state_dict``, same result, same running statistics.

    The module is fused passes over x and a small op between them. They read the parameters of the inner
    layers. Layers that are not as built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(coord_att(x) + residual)``; see `coord_att`."""
        if not as_built(self, x, self.LAYERS):
            return call_layers(super().forward, x, residual, activation)
        self.check(x)
        check_epilogue(x, residual, activation)  # before the batch is counted
        training, momentum = batch_norm_step(self.bn1)
        mode: dict[str, Any] = {"training": training, "momentum": momentum, "eps": self.bn1.eps}
        return coord_att(x, *self.weights(), **mode, residual=residual, activation=activation)
