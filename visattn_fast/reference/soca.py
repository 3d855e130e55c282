"""Second-order channel attention in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import POINTWISE, RELU, SIGMOID, Layers, container, has_plain_layers
from .checks import check_bottleneck, check_feature_map, hidden_width
from .parameter_access import child, weight_and_bias

__all__ = ["SOCA", "soca"]

STEPS = 5  # of the Newton-Schulz iteration


def covariance(x: Tensor) -> Tensor:
    """Covariance of the channels over the pixels, with divisor ``H W``: ``[N, C, H, W]`` -> ``[N, C, C]``."""
    centred = x.flatten(2)
    centred = centred - centred.mean(2, keepdim=True)
    return centred @ centred.transpose(1, 2) / centred.shape[2]


def trace(cov: Tensor) -> Tensor:
    """Trace of ``[N, C, C]`` as ``[N, 1, 1]``; 1 for a matrix of zeros, so that its square root is zeros."""
    found = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    return torch.where(found <= torch.finfo(found.dtype).tiny, 1.0, found)


def square_root(cov: Tensor) -> Tensor:
    """Approximate square root of ``[N, C, C]`` by STEPS Newton-Schulz steps on the matrix divided by its trace."""
    total, three = trace(cov), 3 * torch.eye(cov.shape[1], dtype=cov.dtype, device=cov.device)
    y, z = cov / total, None
    for _ in range(STEPS):
        t = (three - (y if z is None else z @ y)) / 2
        y, z = y @ t, t if z is None else t @ z
    return y * total.sqrt()


def soca_gate(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """The gate that `soca` multiplies x by, ``[N, C, 1, 1]``."""
    pooled = square_root(covariance(x)).mean(1)
    hidden = F.relu(F.linear(pooled, w1.flatten(1), b1))
    return torch.sigmoid(F.linear(hidden, w2.flatten(1), b2))[:, :, None, None]


def soca(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """``x * sigmoid(w2 relu(w1 s + b1) + b2)``; s is the mean over rows of the square root of the channels' covariance.

    Args:
        x: ``[N, C, H, W]``.
        w1, b1: ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    return x * soca_gate(x, w1, b1, w2, b2)


class SOCA(nn.Module):
    """Second-order channel attention.

    ``y = x * sigmoid(conv_du(s))``, where s, ``[N, C, 1, 1]``, is the mean over rows of the square root of the
    channels' covariance, by 5 Newton-Schulz steps on the matrix divided by its trace. For constant maps (1x1 maps
    included) s and the gradient through s are zero.

    The published code centres with a matrix of HW x HW elements, gigabytes for a map of 250x250, and crops maps to
    1000x1000 to bound it. This code subtracts the mean: every pixel counts, and memory is linear in HW.

    Source: Dai et al., "Second-order attention network for single image super-resolution", CVPR 2019.

    Args:
        channels: C.
        reduction: the hidden layer has ``channels // reduction`` units.

    Raises:
        ValueError: a non-positive argument, or fewer channels than ``reduction``.

    ``state_dict``: ``conv_du.0.weight`` ``[R, C, 1, 1]``, ``conv_du.0.bias``, ``conv_du.2.weight`` ``[C, R, 1, 1]``,
    ``conv_du.2.bias``.
    """

    LAYERS = Layers(
        {
            "conv_du": container(nn.Sequential, 4),
            "conv_du.0": POINTWISE,
            "conv_du.1": RELU,
            "conv_du.2": POINTWISE,
            "conv_du.3": SIGMOID,
        }
    )

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        )

    def weights(self) -> tuple[Any, ...]:
        """``(w1, b1, w2, b2)``, as `soca` takes them."""
        first, _, second, _ = child(self, "conv_du")
        return *weight_and_bias(first), *weight_and_bias(second)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        """The gate of x, ``[N, C, 1, 1]``."""
        if has_plain_layers(self, x, self.LAYERS):
            check_bottleneck(x, *self.weights())
        else:
            check_feature_map(x)
        gate: Tensor = self.conv_du(square_root(covariance(x)).mean(1)[:, :, None, None])
        return gate

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of x: ``{"channel": [N, C, 1, 1]}``."""
        return {"channel": self.gate(x)}
