"""The two gates of the global attention mechanism (GAM), fused."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import reference
from ..ops.channel_mlp import CHANNEL_MLP
from ..ops.norm_gate import NORM_GATE
from ..reference.as_built import as_built
from ..reference.checks import check_bottleneck
from ..reference.gam import check_norm_gate
from .calls import call_layers
from .serve import serve, serve_batch_norm

__all__ = ["FastGAM", "channel_mlp", "norm_gate"]


def channel_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """GAM's first factor times x: ``x * (w2 relu(w1 x + b1) + b2)``, an MLP over each pixel's channels, no sigmoid.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: weight ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and bias ``[R]`` or None.
        w2, b2: weight ``[C, R]`` (or ``[C, R, 1, 1]``) and bias ``[C]`` or None.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Liu et al., "Global Attention Mechanism", 2021.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    return serve(CHANNEL_MLP, (x, w1, b1, w2, b2), options=(torch.is_grad_enabled(),))


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
    """Scales x by the sigmoid of another map's batch norm: ``act(x * sigmoid(bn(m)) + residual)``.

    Args:
        x, m: ``[N, C, H, W]``, any floating dtypes, NCHW or channels_last.
        weight, bias, running_mean, running_var, training, momentum, eps: the batch norm's arguments, as in
            `torch.nn.functional.batch_norm`. Training updates the running statistics in place.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation, a single value per channel in training.
        RuntimeError: the backend asked for cannot serve this call.
    """
    check_norm_gate(x, m, weight, bias, running_mean, running_var, training, eps)
    return serve_batch_norm(
        NORM_GATE,
        reference.norm_gate,
        (x, m),
        weight,
        bias,
        (running_mean, running_var),
        training=training,
        momentum=momentum,
        eps=eps,
        residual=residual,
        activation=activation,
    )


class FastGAM(reference.GAM):
    """Fused `reference.GAM`: same constructor, same ``state_dict``, same result, same running statistics.

    `channel_mlp` and `norm_gate` are fused; the convolutions and the first batch norm are PyTorch's, and hooks on them
    run. The ops read the parameters of the other layers, which are called if they are not as built
    (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(gam(x) + residual)``; see `channel_mlp` and `norm_gate`."""
        self.check(x, residual, activation)
        if isinstance(x, Proxy):
            return call_layers(super().forward, x, residual, activation)
        x = channel_mlp(x, *self.channel_weights()) if as_built(self, x, self.CHANNEL) else x * self.factor(x)
        m = self.convolved(x.to(next(self.conv1.parameters(), x).dtype))
        if not as_built(self, x, self.NORM):
            return call_layers(lambda x: x * torch.sigmoid(self.norm2(m)), x, residual, activation)
        step = self.norm_step()
        return norm_gate(x, m, *self.norm_weights(), **step, residual=residual, activation=activation)
