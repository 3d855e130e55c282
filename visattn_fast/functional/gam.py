"""The two gates of the global attention mechanism."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.checks import check_bottleneck
from ..reference.gam import check_norm_gate
from ._gated import TINY, batch_norm_gated


def channel_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """``x * (w2 relu(w1 x + b1) + b2)``, products of each pixel's channels; no sigmoid.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: ``[R, C]`` (or a 1x1 convolution's ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: shapes or devices that do not fit.
        RuntimeError: the backend asked for cannot serve.

    Source: Liu et al., "Global Attention Mechanism", 2021.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    if not fused(x, TINY[reference.channel_mlp]):
        return ops.mixed(reference.channel_mlp, x, w1, b1, w2, b2)
    return ops.run(ops.ChannelMLPFunction, x, w1, b1, w2, b2, torch.is_grad_enabled())[0]


def norm_gate(
    x: Tensor,
    m: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x * sigmoid(bn(m)) + residual)``: a map scaled by the sigmoid of another one's batch norm.

    Args:
        x, m: ``[N, C, H, W]``, any floating dtypes, NCHW or channels_last.
        weight, bias, running_mean, running_var, training, momentum, eps: of the batch norm, as in `F.batch_norm`; in
            training the running statistics are updated in place.
        residual, activation: as in `se`.

    Returns, raises: as `se`; ValueError for a single value per channel in training.
    """
    check_norm_gate(x, m, weight, bias, running_mean, running_var, training, eps)
    return batch_norm_gated(
        reference.norm_gate, ops.NormGateFunction, (x, m), weight, bias, (running_mean, running_var),
        training, momentum, eps, residual, activation,
    )  # fmt: skip
