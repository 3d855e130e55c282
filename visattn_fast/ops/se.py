"""Squeeze-and-excitation: ``x * sigmoid(w2 relu(w1 mean(x) + b1) + b2)``.

Mean, hidden layer and gate are saved for backward. The Triton kernels move the bytes of x 3 times forward (read to
pool, read to scale, write y) and 4 times backward (read grad and x, read grad, write dx).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.checks import ACTIVATIONS, GATES
from .declare import gate_op
from .epilogue import activation_gradient, finish, residual_gradient, start_backward
from .layout import accumulation_dtype, as_matrices, to_map

# ``hidden`` is the tensor from which the activation's derivative follows: the result of ReLU, the argument of SiLU.
_RELU = ACTIVATIONS.index("relu")


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: int,
    hidden_activation: int,
    gate_activation: int,
) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    w1, b1, w2, b2 = as_matrices(a, w1, b1, w2, b2)
    mean = x.mean((2, 3), dtype=a)
    hidden = F.linear(mean, w1, b1)
    hidden = F.relu(hidden) if hidden_activation == _RELU else hidden
    excited = F.linear(_activate(hidden, hidden_activation), w2, b2)
    gate = F.hardsigmoid(excited) if gate_activation else torch.sigmoid(excited)
    return finish(x, gate[:, :, None, None], residual, activation), mean, hidden, gate


def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    hidden: Tensor,
    gate: Tensor,
    activation: int,
    hidden_activation: int,
    gate_activation: int,
) -> tuple[Tensor, ...]:
    a = accumulation_dtype(x)
    grad = start_backward(grad, x, gate[:, :, None, None], residual, activation)
    # Not torch.where of two numbers, which makes float32 of 1 / 6.
    slope = ((gate > 0) & (gate < 1)).to(a) / 6 if gate_activation else gate * (1 - gate)
    dz2 = (grad * x).sum((2, 3)) * slope
    dz1 = activation_gradient(dz2 @ w2.flatten(1).to(a), hidden, hidden_activation)
    dmean = dz1 @ w1.flatten(1).to(a)
    dx = grad * gate[:, :, None, None] + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    dw1, dw2 = (dz1.t() @ mean).view(w1.shape), (dz2.t() @ _activate(hidden, hidden_activation)).view(w2.shape)
    return to_map(dx, x), residual_gradient(grad, x, activation), dw1, dz1.sum(0), dw2, dz2.sum(0)


def _activate(hidden: Tensor, code: int) -> Tensor:
    return hidden if code == _RELU else F.silu(hidden)


def _mathematics(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden_activation: int,
    gate_activation: int,
) -> Tensor:
    return reference.se(x, w1, b1, w2, b2, str(ACTIVATIONS[hidden_activation]), GATES[gate_activation])


SE = gate_op(
    "se",
    weights={"w1": "R C", "b1": "R or None", "w2": "C R", "b2": "C or None"},
    options="int hidden_activation, int gate_activation",
    ranges={"hidden_activation": "1..2", "gate_activation": "0..1"},
    saves={"mean": "N C", "hidden": "N R", "gate": "N C"},
    unread=("b1", "b2"),
    forward=_forward,
    backward=_backward,
    mathematics=_mathematics,
    infer=True,
    normed=True,
    tiny=25,
    over_positions=True,
)
