"""Passes along H and W: launchers for means of every row and column, a gate for each, and their gradients.

Lines `[N, C, H + W]` hold a value for each row of a channel, then one for each column.
"""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..passes.lines.axis import apply_line_gates, line_sums
from ..passes.lines.axis_tiles import canonical_with_lines, dense_lines


def axis_mean(x: torch.Tensor) -> torch.Tensor:
    """Computes means over W, then over H, as lines. x [N, C, H, W]. Reads x once."""
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        return line_sums(x, layout, (layout.W, layout.H))


def axis_scale(x: torch.Tensor, gates: torch.Tensor, residual: torch.Tensor | None, activation: int) -> torch.Tensor:
    """Computes y = act(x * row gate * column gate + residual), gates as lines. Reads x (and the residual), writes y."""
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        strides = (layout.stride_n, layout.stride_o)
        residual = layout.dense_or_none(residual)
        return apply_line_gates(x, x, layout, strides, dense_lines(gates, layout), residual, activation=activation)


def axis_scale_bwd(
    grad: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dgates as lines: sums of g' x times the other axis' gate, g' = grad * act'(x * gates + residual).

    Returns dgates, dresidual. Reads x and grad once. With an activation g' is written as dresidual (else empty), and a
    residual is read.
    """
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        dresidual = layout.empty_dresidual(x, activation)
        dgates = line_sums(
            x,
            layout,
            grad=layout.dense(grad),
            gates=dense_lines(gates, layout),
            residual=layout.dense_or_none(residual if activation else None),
            dresidual=dresidual if activation else None,
            activation=activation,
        )
        return dgates, dresidual


def axis_input_grad(grad: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, dmeans: torch.Tensor) -> torch.Tensor:
    """Computes dx = grad * row gate * column gate + dmeans' row / W + dmeans' column / H. Reads grad, writes dx."""
    with device_guard(x):
        x, layout = canonical_with_lines(x)
        strides = (layout.C * layout.HW, layout.C if layout.channels_last else layout.HW)
        gates, dmeans = dense_lines(gates, layout), dense_lines(dmeans, layout)
        return apply_line_gates(layout.dense(grad), x, layout, strides, gates, dmeans=dmeans)
