"""Means over W and over H, and gates per row and per column: four ops, each one pass over x.

Lines ``[N, C, H + W]``, in the accumulation dtype, hold a value for each row of a channel, then one for each column.
They are dense along H + W if x is in NCHW, and along C if it is in channels_last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .epilogue import finish, residual_gradient, residual_gradient_shape, start_backward
from .layout import accumulation_dtype, empty_small, memory_format, to_map
from .library import define
from .shapes import Arguments
from .signature import MAP


def _empty_lines(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if memory_format(x) == torch.channels_last:
        return empty_small(x, n, h + w, c).mT
    return empty_small(x, n, c, h + w)


def _to_lines(rows: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    return _empty_lines(x).copy_(torch.cat([rows, columns], 2))


def _rows_and_columns(lines: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Splits lines into ``[N, C, H, 1]`` and ``[N, C, 1, W]``, which broadcast to x."""
    rows, columns = lines.split([x.shape[2], x.shape[3]], 2)
    return rows[:, :, :, None], columns[:, :, None]


def _axis_mean_reference(x: Tensor) -> Tensor:
    a = accumulation_dtype(x)
    return _to_lines(x.mean(3, dtype=a), x.mean(2, dtype=a), x)


def _axis_scale_reference(x: Tensor, gates: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    rows, columns = _rows_and_columns(gates, x)
    return finish(x, rows * columns, residual, activation)


def _axis_scale_bwd_reference(
    grad: Tensor, x: Tensor, gates: Tensor, residual: Tensor | None, activation: int
) -> tuple[Tensor, ...]:
    rows, columns = _rows_and_columns(gates, x)
    grad = start_backward(grad, x, rows * columns, residual, activation)
    product = grad * x
    dgates = _to_lines((product * columns).sum(3), (product * rows).sum(2), x)
    return dgates, residual_gradient(grad, x, activation)


def _axis_input_grad_reference(grad: Tensor, x: Tensor, gates: Tensor, dmeans: Tensor) -> Tensor:
    rows, columns = _rows_and_columns(gates, x)
    drows, dcolumns = _rows_and_columns(dmeans, x)
    return to_map(grad.to(gates.dtype) * (rows * columns) + (drows / x.shape[3] + dcolumns / x.shape[2]), x)


def _lines(given: Arguments) -> Tensor:
    """Allocates lines, from the op's arguments by name: their declared shape."""
    return _empty_lines(given["x"])


_GATED = {"x": MAP, "gates": "N C H+W : lines of x"}
axis_mean = define("axis_mean(Tensor x) -> Tensor", "axis", _axis_mean_reference, (_lines,), {"x": MAP})
axis_scale = define(
    "axis_scale(Tensor x, Tensor gates, Tensor? residual, int activation) -> Tensor",
    "axis",
    _axis_scale_reference,
    ("like x",),
    {**_GATED, "residual": "like x"},
)
axis_scale_bwd = define(
    "axis_scale_bwd(Tensor grad, Tensor x, Tensor gates, Tensor? residual, int activation)"
    " -> (Tensor dgates, Tensor dresidual)",
    "axis",
    _axis_scale_bwd_reference,
    (_lines, residual_gradient_shape),
    {**_GATED, "residual": "like x", "grad": "like x"},
)
axis_input_grad = define(  # reads the layout of x, not its values
    "axis_input_grad(Tensor grad, Tensor x, Tensor gates, Tensor dmeans) -> Tensor",
    "axis",
    _axis_input_grad_reference,
    ("like x",),
    {**_GATED, "grad": "like x", "dmeans": "N C H+W : lines of x"},
)
