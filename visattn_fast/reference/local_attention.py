"""Local attention in plain PyTorch: a channel gate times a spatial gate that each pixel computes from its channels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import MEAN, POINTWISE, RELU, SIGMOID, Layers, container, has_plain_layers
from .checks import check_bottleneck, check_feature_map, check_floating, check_weight, hidden_width
from .parameter_access import child, weight_and_bias
from .se import se_gate

__all__ = ["LocalAttention", "local_attention"]


def local_attention(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    p1: Tensor,
    q1: Tensor | None,
    p2: Tensor,
    q2: Tensor | None,
) -> Tensor:
    """``x * (sigmoid(w2 relu(w1 mean(x) + b1) + b2) * sigmoid(p2 relu(p1 x + q1) + q2))``.

    The mean is over H and W; p1 and p2 act on the channels of each pixel.

    Args:
        x: ``[N, C, H, W]``.
        w1, b1: ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.
        p1, q1: ``[S, C]`` (or ``[S, C, 1, 1]``) and ``[S]`` or None.
        p2, q2: ``[1, S]`` (or ``[1, S, 1, 1]``) and ``[1]`` or None.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    channel, spatial = local_gates(x, w1, b1, w2, b2, p1, q1, p2, q2)
    return x * (channel * spatial)


def local_gates(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    p1: Tensor,
    q1: Tensor | None,
    p2: Tensor,
    q2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gates that `local_attention` multiplies: ``[N, C, 1, 1]`` and ``[N, 1, H, W]``."""
    check_pixel_mlp(x, p1, q1, p2, q2)
    hidden = F.relu(F.conv2d(x, p1.flatten(1)[:, :, None, None], q1))
    spatial = torch.sigmoid(F.conv2d(hidden, p2.flatten(1)[:, :, None, None], q2))
    return se_gate(x, w1, b1, w2, b2), spatial


def check_local_attention(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    p1: Tensor,
    q1: Tensor | None,
    p2: Tensor,
    q2: Tensor | None,
) -> None:
    """Raises unless the arguments of `local_attention` fit each other."""
    check_bottleneck(x, w1, b1, w2, b2)
    check_pixel_mlp(x, p1, q1, p2, q2)


def check_pixel_mlp(x: Tensor, p1: Tensor, q1: Tensor | None, p2: Tensor, q2: Tensor | None) -> None:
    """Raises unless p1 ``[S, C]``, q1 ``[S]``, p2 ``[1, S]`` and q2 ``[1]`` fit each other and x."""
    check_floating("p1", p1)
    if p1.dim() < 2 or p1.shape[0] == 0:
        raise ValueError(f"p1 must have shape [S, C] with S >= 1, got {list(p1.shape)}")
    check_feature_map(x, p1.shape[1])
    check_weight("p1", p1, tuple(p1.shape[:2]), x)
    check_weight("p2", p2, (1, p1.shape[0]), x)
    if q1 is not None:
        check_weight("q1", q1, (p1.shape[0],), x)
    if q2 is not None:
        check_weight("q2", q2, (1,), x)


class LocalAttention(nn.Module):
    """Channel and spatial attention, both computed from x and multiplied.

    ``y = x * (channel * spatial)``: x and y ``[N, C, H, W]``; ``channel = sigmoid(c2 relu(c1 mean(x)))``, the mean
    over H and W; ``spatial = sigmoid(p2 relu(p1 x))``, 1x1 convolutions C -> C // reduction -> 1. All have biases.

    Args:
        channels: C.
        reduction: the hidden layers have ``channels // reduction`` units.

    Raises:
        ValueError: a non-positive argument, or fewer channels than ``reduction``.

    ``state_dict``: ``channel_attention.1.weight`` ``[R, C, 1, 1]``, ``channel_attention.3.weight`` ``[C, R, 1, 1]``,
    ``spatial_attention.0.weight`` ``[R, C, 1, 1]``, ``spatial_attention.2.weight`` ``[1, R, 1, 1]``, and their biases.
    """

    LAYERS = Layers(
        {
            "channel_attention": container(nn.Sequential, 5),
            "channel_attention.0": MEAN,
            "channel_attention.1": POINTWISE,
            "channel_attention.2": RELU,
            "channel_attention.3": POINTWISE,
            "channel_attention.4": SIGMOID,
            "spatial_attention": container(nn.Sequential, 4),
            "spatial_attention.0": POINTWISE,
            "spatial_attention.1": RELU,
            "spatial_attention.2": POINTWISE,
            "spatial_attention.3": SIGMOID,
        }
    )

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.channel_attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.spatial_attention = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, 1, 1), nn.Sigmoid()
        )

    def weights(self) -> tuple[Any, ...]:
        """``(w1, b1, w2, b2, p1, q1, p2, q2)``, as `local_attention` takes them."""
        _, c1, _, c2, _ = child(self, "channel_attention")
        p1, _, p2, _ = child(self, "spatial_attention")
        return *weight_and_bias(c1), *weight_and_bias(c2), *weight_and_bias(p1), *weight_and_bias(p2)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return x * (self.channel_attention(x) * self.spatial_attention(x))

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the layers."""
        if has_plain_layers(self, x, self.LAYERS):
            check_local_attention(x, *self.weights())
        else:
            check_feature_map(x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """Both gates of x: ``{"channel": [N, C, 1, 1], "spatial": [N, 1, H, W]}``."""
        self.check(x)
        return {"channel": self.channel_attention(x), "spatial": self.spatial_attention(x)}
