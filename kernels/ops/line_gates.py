"""Gates of every row and column of a channel from the means of all: launchers; see `ops.line_gates`."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import contiguous
from ..passes.lines.gate_grads import hidden_grads, line_gate_grads, line_weight_grads, mean_grads
from ..passes.lines.gates import AxisWeights, Norm, gated_lines, hidden_lines, hidden_statistics, sigmoid_lines


def line_gates_fwd(
    means: torch.Tensor,
    height: int,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    w_h: torch.Tensor,
    b_h: torch.Tensor | None,
    w_w: torch.Tensor,
    b_w: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes gates, z, mean, var; mean and var are empty if they were given. Reads means and writes gates once."""
    with device_guard(means):
        lines = gated_lines(means, height, w1)
        z, partials = hidden_lines(lines, w1.contiguous(), contiguous(b1), with_partials=mean is None)
        if partials is None:
            norm_mean, norm_var, batch = contiguous(mean), contiguous(var), (means.new_empty(0), means.new_empty(0))
        else:
            norm_mean, norm_var = batch = hidden_statistics(lines, partials)
        norm = Norm(norm_mean, norm_var, contiguous(bn_weight), contiguous(bn_bias))
        weights = AxisWeights(w_h.contiguous(), contiguous(b_h), w_w.contiguous(), contiguous(b_w))
        return sigmoid_lines(lines, z, norm, weights, eps), z, *batch


def line_gates_bwd(
    dgates: torch.Tensor,
    gates: torch.Tensor,
    means: torch.Tensor,
    z: torch.Tensor,
    height: int,
    w1: torch.Tensor,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    w_h: torch.Tensor,
    w_w: torch.Tensor,
    eps: float,
    fixed: bool,
) -> tuple[torch.Tensor, ...]:
    """Computes dmeans, sums [3, M], db_h, db_w, dw1, dw_h, dw_w."""
    with device_guard(means):
        lines = gated_lines(means, height, w1)
        g = line_gate_grads(lines, dgates, gates, eps, fixed)
        norm = Norm(*map(contiguous, (mean, var, bn_weight, bn_bias)))
        hidden = hidden_grads(g, z, norm, AxisWeights(w_h.contiguous(), None, w_w.contiguous(), None))
        dmeans = mean_grads(g, hidden, w1)
        dw1, d = line_weight_grads(g, hidden, w1, w_h, w_w)
        return dmeans, hidden.sums, d.b_h, d.b_w, dw1, d.w_h, d.w_w
