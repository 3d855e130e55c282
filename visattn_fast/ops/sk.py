"""Selective kernels: the passes over the branches of `branches`, and between them the gate's algebra in PyTorch.

Forward reads both branches twice and writes y. Pooled values, hidden layer, gate and statistics are saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .autograd import without_autocast
from .branches import branch_dot, branch_grad, branch_mean, branch_sum
from .declare import composed_op
from .layout import as_matrices


@without_autocast
def _forward(
    v1: Tensor,
    v2: Tensor,
    w: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    # float64, because the batch norm of few pooled values magnifies rounding.
    w, norm_weight, norm_bias, w1, b1, w2, b2 = as_matrices(torch.float64, w, norm_weight, norm_bias, w1, b1, w2, b2)
    mean = branch_mean(v1, v2)
    z = F.linear(mean.double(), w)
    if running_mean is None:  # the batch's own statistics
        var, center = torch.var_mean(z, 0, correction=0)
    else:
        assert running_var is not None
        center, var = running_mean.to(z.dtype, copy=True), running_var.double()
    rstd = (var + eps).rsqrt()
    hidden = F.relu((z - center) * rstd * norm_weight + norm_bias)
    gate = torch.softmax(torch.stack([F.linear(hidden, w1, b1), F.linear(hidden, w2, b2)], 1), 1).to(mean.dtype)
    return branch_sum(v1, v2, gate), mean, z, hidden, gate, center, rstd


@without_autocast
def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any, needs: Any) -> tuple[Tensor | None, ...]:
    v1, v2, *weights = tensors
    w, norm_weight, _, running_mean, _, w1, _, w2, _ = as_matrices(torch.float64, *weights)
    mean, z, hidden, gate, center, rstd = small
    dgate = branch_dot(grad, v1, v2)
    dlogits = gate.double() * (dgate - (gate.double() * dgate).sum(1, keepdim=True))
    d1, d2 = dlogits[:, 0], dlogits[:, 1]
    dhidden = torch.where(hidden <= 0, 0.0, d1 @ w1 + d2 @ w2)
    normal, dz = (z - center) * rstd, dhidden * norm_weight
    if running_mean is None:
        dz = dz - dz.mean(0) - normal * (dz * normal).mean(0)
    dz = dz * rstd
    dv1, dv2 = branch_grad(grad, v1, v2, gate, (dz @ w).to(mean.dtype)) if any(needs[:2]) else (None, None)
    products = dz.t() @ mean.double(), d1.t() @ hidden, d2.t() @ hidden
    dw, dw1, dw2 = (d.view(weights[i].shape) for d, i in zip(products, (0, 5, 7), strict=True))
    return dv1, dv2, dw, (dhidden * normal).sum(0), dhidden.sum(0), None, None, dw1, d1.sum(0), dw2, d2.sum(0)


def _mathematics(*tensors_and_eps: Any) -> Tensor:
    *tensors, eps = tensors_and_eps
    return reference.sk(*tensors, eps=eps)


# Compiled, Inductor fuses the branches' own norms with the selection. An op would need the normalised maps in memory.
SK = composed_op("sk", _forward, _gradients, _mathematics, partial=True, compiled_plain=True)
