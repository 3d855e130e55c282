"""Squeeze-and-excitation: ops and autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import reference
from ..reference.checks import ACTIVATIONS, GATES
from .autograd import fused_function
from .epilogue import (
    activation_gradient,
    empty_residual_gradient,
    finish,
    residual_gradient,
    start_backward,
    with_epilogue,
)
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define, define_infer, define_normed

_RELU = ACTIVATIONS.index("relu")  # of which ``hidden`` is the result; of another activation it is the argument


def _se_fwd_reference(x, w1, b1, w2, b2, residual, activation, hidden_activation, gate_activation):
    a = accumulation_dtype(x)
    w1, b1, w2, b2 = (None if t is None else t.to(a) for t in (w1.flatten(1), b1, w2.flatten(1), b2))
    mean = x.mean((2, 3), dtype=a)
    hidden = F.linear(mean, w1, b1)
    hidden = F.relu(hidden) if hidden_activation == _RELU else hidden
    excited = F.linear(_activate(hidden, hidden_activation), w2, b2)
    gate = F.hardsigmoid(excited) if gate_activation else torch.sigmoid(excited)
    return finish(x, gate[:, :, None, None], residual, activation), mean, hidden, gate


def _se_bwd_reference(grad, x, w1, w2, residual, mean, hidden, gate, activation, hidden_activation, gate_activation):
    a = accumulation_dtype(x)
    grad = start_backward(grad, x, gate[:, :, None, None], residual, activation)
    slope = torch.where((gate <= 0) | (gate >= 1), 0.0, 1 / 6) if gate_activation else gate * (1 - gate)
    dz2 = (grad * x).sum((2, 3)) * slope
    dz1 = activation_gradient(dz2 @ w2.flatten(1).to(a), hidden, hidden_activation)
    dmean = dz1 @ w1.flatten(1).to(a)
    dx = grad * gate[:, :, None, None] + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    dw1, dw2 = (dz1.t() @ mean).view(w1.shape), (dz2.t() @ _activate(hidden, hidden_activation)).view(w2.shape)
    return to_map(dx, x), residual_gradient(grad, x, activation), dw1, dz1.sum(0), dw2, dz2.sum(0)


def _activate(hidden, code):
    return hidden if code == _RELU else F.silu(hidden)


def _se_fwd_fake(x, w1, b1, w2, b2, residual, activation, hidden_activation, gate_activation):
    n, c, r = x.shape[0], x.shape[1], w1.shape[0]
    return empty_map(x), empty_small(x, n, c), empty_small(x, n, r), empty_small(x, n, c)


def _se_bwd_fake(grad, x, w1, w2, residual, mean, hidden, gate, activation, hidden_activation, gate_activation):
    dw1, dw2 = empty_small(x, *w1.shape), empty_small(x, *w2.shape)
    db1, db2 = empty_small(x, w1.shape[0]), empty_small(x, w2.shape[0])
    return empty_map(x), empty_residual_gradient(x, activation), dw1, db1, dw2, db2


se_fwd = define(
    "se_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, int activation,"
    " int hidden_activation, int gate_activation) -> (Tensor y, Tensor mean, Tensor hidden, Tensor gate)",
    "se",
    _se_fwd_reference,
    _se_fwd_fake,
)
se_infer = define_infer("se")
se_normed = define_normed("se")
se_bwd = define(
    "se_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor? residual, Tensor mean, Tensor hidden, Tensor gate,"
    " int activation, int hidden_activation, int gate_activation)"
    " -> (Tensor dx, Tensor dresidual, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)",
    "se",
    _se_bwd_reference,
    _se_bwd_fake,
    gradients_of=("w1", "w1", "w2", "w2"),
)


def _gradients(grad, tensors, small, options):
    x, w1, _, w2, _, residual = tensors
    dx, dresidual, dw1, db1, dw2, db2 = se_bwd(grad, x, w1, w2, residual, *small, *options)
    return dx, dw1, db1, dw2, db2, dresidual


def se_mathematics(x, w1, b1, w2, b2, hidden_activation, gate_activation):
    """`reference.se`, with codes for names."""
    return reference.se(x, w1, b1, w2, b2, str(ACTIVATIONS[hidden_activation]), GATES[gate_activation])


SEFunction = fused_function("SEFunction", se_fwd, _gradients, with_epilogue(se_mathematics, options=2), infer=se_infer)
