"""scSE: ops and autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import reference
from .autograd import fused_function
from .epilogue import empty_residual_gradient, finish, residual_gradient, start_backward, with_epilogue
from .layout import accumulation_dtype, empty_map, empty_small, to_map
from .library import define


def _scse_fwd_reference(x, w1, b1, w2, b2, ws, bs, residual, activation):
    a = accumulation_dtype(x)
    mean = x.mean((2, 3), dtype=a)
    hidden, channel_gate = mean_gate(mean, w1, b1, w2, b2)
    logits = torch.einsum("nchw,c->nhw", x.to(a), ws.flatten().to(a))
    spatial_gate = torch.sigmoid(logits if bs is None else logits + bs.to(a))
    y = finish(x, channel_gate[:, :, None, None] + spatial_gate[:, None], residual, activation)
    return y, mean, hidden, channel_gate, spatial_gate


def _scse_bwd_reference(grad, x, w1, w2, ws, residual, mean, hidden, channel_gate, spatial_gate, activation):
    gate = channel_gate[:, :, None, None] + spatial_gate[:, None]
    grad = start_backward(grad, x, gate, residual, activation)
    product = grad * x
    dz_s = product.sum(1) * spatial_gate * (1 - spatial_gate)
    dmean, *dweights = mean_gate_backward(product.sum((2, 3)), w1, w2, mean, hidden, channel_gate)
    dws = torch.einsum("nchw,nhw->c", x.to(grad.dtype), dz_s).view(ws.shape)
    through_spatial = ws.view(1, -1, 1, 1).to(grad.dtype) * dz_s[:, None]
    dx = grad * gate + through_spatial + dmean[:, :, None, None] / (x.shape[2] * x.shape[3])
    return to_map(dx, x), residual_gradient(grad, x, activation), *dweights, dws, dz_s.sum().view(1)


def mean_gate(mean, w1, b1, w2, b2):
    """Means ``[N, C]`` -> hidden ``[N, R]`` and gate ``[N, C]``."""
    w1, b1, w2, b2 = (None if t is None else t.to(mean.dtype) for t in (w1.flatten(1), b1, w2.flatten(1), b2))
    hidden = F.relu(F.linear(mean, w1, b1))
    return hidden, torch.sigmoid(F.linear(hidden, w2, b2))


def mean_gate_backward(dgate, w1, w2, mean, hidden, gate):
    """Gradient of `mean_gate`'s gate -> those of the means, w1, b1, w2 and b2."""
    dz2 = dgate * gate * (1 - gate)
    dz1 = torch.where(hidden <= 0, 0.0, dz2 @ w2.flatten(1).to(dz2.dtype))
    dw1, dw2 = (dz1.t() @ mean).view(w1.shape), (dz2.t() @ hidden).view(w2.shape)
    return dz1 @ w1.flatten(1).to(dz1.dtype), dw1, dz1.sum(0), dw2, dz2.sum(0)


def empty_small_gates(x, w1):
    """The fakes of mean ``[N, C]``, hidden ``[N, R]``, channel gate ``[N, C]`` and spatial gate ``[N, H, W]``."""
    n, c, h, w = x.shape
    return empty_small(x, n, c), empty_small(x, n, w1.shape[0]), empty_small(x, n, c), empty_small(x, n, h, w)


def empty_weight_gradients(x, *weights):
    """The fakes of the gradients of weights, and of the biases that follow each."""
    return tuple(empty_small(x, *shape) for w in weights for shape in (w.shape, w.shape[:1]))


def _scse_fwd_fake(x, w1, b1, w2, b2, ws, bs, residual, activation):
    return empty_map(x), *empty_small_gates(x, w1)


def _scse_bwd_fake(grad, x, w1, w2, ws, residual, mean, hidden, channel_gate, spatial_gate, activation):
    return empty_map(x), empty_residual_gradient(x, activation), *empty_weight_gradients(x, w1, w2, ws)


scse_fwd = define(
    "scse_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor ws, Tensor? bs, Tensor? residual,"
    " int activation) -> (Tensor y, Tensor mean, Tensor hidden, Tensor channel_gate, Tensor spatial_gate)",
    "scse",
    _scse_fwd_reference,
    _scse_fwd_fake,
)
scse_bwd = define(
    "scse_bwd(Tensor grad, Tensor x, Tensor w1, Tensor w2, Tensor ws, Tensor? residual, Tensor mean, Tensor hidden,"
    " Tensor channel_gate, Tensor spatial_gate, int activation) -> (Tensor dx, Tensor dresidual, Tensor dw1,"
    " Tensor db1, Tensor dw2, Tensor db2, Tensor dws, Tensor dbs)",
    "scse",
    _scse_bwd_reference,
    _scse_bwd_fake,
    gradients_of=("w1", "w1", "w2", "w2", "ws", "ws"),
)


def _gradients(grad, tensors, small, options):
    x, w1, _, w2, _, ws, _, residual = tensors
    dx, dresidual, *dweights = scse_bwd(grad, x, w1, w2, ws, residual, *small, *options)
    return dx, *dweights, dresidual


ScSEFunction = fused_function("ScSEFunction", scse_fwd, _gradients, with_epilogue(reference.scse))
