"""CBAM and its two halves in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import POINTWISE_WITHOUT_BIAS, SAME_SIZE, Layers, container, has_plain_layers
from .checks import check_bottleneck, check_feature_map, check_spatial_kernel, hidden_width
from .parameter_access import child, parameter, weight_and_bias
from .positions import over_positions

__all__ = ["CBAM", "ChannelAttention", "SpatialAttention", "cbam", "channel_attention", "spatial_attention"]


CALLED_TWICE = POINTWISE_WITHOUT_BIAS._replace(twice=True)  # for the mean and for the maximum


@over_positions
def channel_attention(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The gate ``sigmoid(f(mean(x)) + f(max(x)))`` with ``f(v) = w2 relu(w1 v)``, mean and max over H and W.

    The gradient of the maximum goes to one pixel, the first of equal maxima.

    Args:
        x: ``[N, C, H, W]``.
        w1, w2: ``[R, C]`` and ``[C, R]``, or as 1x1 convolutions ``[R, C, 1, 1]`` and ``[C, R, 1, 1]``.

    Returns:
        ``[N, C, 1, 1]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    check_bottleneck(x, w1, None, w2, None)
    w1, w2 = w1.flatten(1), w2.flatten(1)
    mean, maximum = x.mean((2, 3)), global_maximum(x).flatten(1)
    excited = F.linear(F.relu(F.linear(mean, w1)), w2) + F.linear(F.relu(F.linear(maximum, w1)), w2)
    return torch.sigmoid(excited)[:, :, None, None]


def global_maximum(x: Tensor) -> Tensor:
    """Maximum over H and W, ``[N, C, 1, 1]``; its gradient goes to the first of equal maxima.

    Exported programs take a reduction, which every runtime has. In eager mode a reduction is slower, and its gradient
    is shared among equal maxima. On GPUs the gradient of a pooled maximum is not deterministic, and PyTorch refuses it.
    """
    if torch.compiler.is_exporting():
        return x.amax((2, 3), keepdim=True)
    if torch.are_deterministic_algorithms_enabled():
        return x.flatten(2).max(2).values[:, :, None, None]
    return F.adaptive_max_pool2d(x, 1)


def spatial_attention(x: Tensor, wconv: Tensor, bias: Tensor | None = None) -> Tensor:
    """The gate ``sigmoid(conv([mean(x), max(x)]) + bias)``, mean and max over C, zero padding.

    The gradient of the maximum goes to one channel, the first of equal maxima.

    Args:
        x: ``[N, C, H, W]``.
        wconv: ``[1, 2, k, k]`` with odd k; its first input is the mean.
        bias: ``[1]`` or None.

    Returns:
        ``[N, 1, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an even k.
        TypeError: a dtype that is not floating-point.
    """
    check_spatial_kernel(x, wconv, bias)
    maps = torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True).values], dim=1)
    return torch.sigmoid(F.conv2d(maps, wconv, bias, padding=wconv.shape[3] // 2))


def cbam(x: Tensor, w1: Tensor, w2: Tensor, wconv: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x * channel_attention(x)``, then ``y * spatial_attention(y)``: ``[N, C, H, W]`` -> ``[N, C, H, W]``.

    Arguments and errors as for `channel_attention` and `spatial_attention`.
    """
    y = x * channel_attention(x, w1, w2)
    return y * spatial_attention(y, wconv, bias)


class ChannelAttention(nn.Module):
    """CBAM's channel gate (Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018).

    ``sigmoid(f(mean) + f(max))`` with ``f = fc2 relu fc1`` shared, mean and max over H and W: ``[N, C, H, W]`` ->
    ``[N, C, 1, 1]``. The gradient of the maximum goes to one pixel, the first of equal maxima.

    Args:
        channels: C.
        reduction: the hidden layer has ``channels // reduction`` units.

    Raises:
        ValueError: a non-positive argument, or fewer channels than ``reduction``.

    ``state_dict``: ``fc1.weight`` ``[R, C, 1, 1]``, ``fc2.weight`` ``[C, R, 1, 1]``.
    """

    LAYERS = Layers({"fc1": CALLED_TWICE, "fc2": CALLED_TWICE})

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def weights(self) -> tuple[Tensor, Tensor]:
        """``(w1, w2)``, as `channel_attention` takes them."""
        return parameter(child(self, "fc1"), "weight"), parameter(child(self, "fc2"), "weight")

    @over_positions
    def forward(self, x: Tensor) -> Tensor:
        """Computes the gate: ``[N, C, H, W]`` -> ``[N, C, 1, 1]``."""
        if has_plain_layers(self, x, self.LAYERS):
            w1, w2 = self.weights()
            check_bottleneck(x, w1, None, w2, None)
        else:
            check_feature_map(x)
        return self.gate(x.mean((2, 3), keepdim=True), global_maximum(x))

    def gate(self, mean: Tensor, maximum: Tensor) -> Tensor:
        """The gate from mean and maximum over H and W, each ``[N, C, 1, 1]``: ``[N, C, 1, 1]``."""
        excited: Tensor = self.fc2(F.relu(self.fc1(mean))) + self.fc2(F.relu(self.fc1(maximum)))
        return torch.sigmoid(excited)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of x: ``{"channel": [N, C, 1, 1]}``."""
        return {"channel": ChannelAttention.forward(self, x)}


class SpatialAttention(nn.Module):
    """CBAM's spatial gate (Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018).

    ``sigmoid(conv1([mean, max]))``, mean and max over C in this order: ``[N, C, H, W]`` -> ``[N, 1, H, W]``. The
    gradient of the maximum goes to one channel, the first of equal maxima.

    Args:
        kernel_size: width of the convolution, 3 or 7.

    Raises:
        ValueError: another ``kernel_size``.

    ``state_dict``: ``conv1.weight`` ``[1, 2, k, k]``.
    """

    LAYERS = Layers({"conv1": SAME_SIZE})

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size not in (3, 7):
            raise ValueError(f"kernel_size must be 3 or 7, got {kernel_size!r}")
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """``(wconv, bias)``, as `spatial_attention` takes them."""
        return weight_and_bias(child(self, "conv1"))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the gate: ``[N, C, H, W]`` -> ``[N, 1, H, W]``."""
        if has_plain_layers(self, x, self.LAYERS):
            check_spatial_kernel(x, *self.weights())
        else:
            check_feature_map(x)
        return self.gate(torch.cat([x.mean(1, keepdim=True), x.max(dim=1, keepdim=True).values], dim=1))

    def gate(self, maps: Tensor) -> Tensor:
        """The gate from mean and maximum over C: ``[N, 2, H, W]`` -> ``[N, 1, H, W]``."""
        logit: Tensor = self.conv1(maps)
        return torch.sigmoid(logit)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of x: ``{"spatial": [N, 1, H, W]}``."""
        return {"spatial": SpatialAttention.forward(self, x)}


class CBAM(nn.Module):
    """Convolutional block attention module (Woo et al., ECCV 2018).

    ``y = x * CA(x)``, then ``y * SA(y)``: ``[N, C, H, W]`` -> ``[N, C, H, W]``.

    Args:
        channels: C.
        reduction: the channel gate's hidden layer has ``channels // reduction`` units.
        kernel_size: width of the spatial gate's convolution, 3 or 7.

    Raises:
        ValueError: a non-positive argument, fewer channels than ``reduction``, another ``kernel_size``.

    ``state_dict``: ``channelattention.fc1.weight``, ``channelattention.fc2.weight``, ``spatialattention.conv1.weight``.
    """

    PARTS = Layers(
        {"channelattention": container(ChannelAttention, 2), "spatialattention": container(SpatialAttention, 1)}
    )
    LAYERS = Layers(
        {
            "channelattention": container(ChannelAttention, 2),
            "channelattention.fc1": CALLED_TWICE,
            "channelattention.fc2": CALLED_TWICE,
            "spatialattention": container(SpatialAttention, 1),
            "spatialattention.conv1": SAME_SIZE,
        }
    )

    def __init__(self, channels: int, reduction: int = 8, kernel_size: int = 7) -> None:
        super().__init__()
        self.channelattention = ChannelAttention(channels, reduction)
        self.spatialattention = SpatialAttention(kernel_size)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(w1, w2, wconv, bias)``, as `cbam` takes them."""
        channel, spatial = child(self, "channelattention"), child(self, "spatialattention")
        w1, w2 = parameter(child(channel, "fc1"), "weight"), parameter(child(channel, "fc2"), "weight")
        return w1, w2, *weight_and_bias(child(spatial, "conv1"))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        y: Tensor = x * self.channelattention(x)
        return y * self.spatialattention(y)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """Both gates of x: ``{"channel": [N, C, 1, 1], "spatial": [N, 1, H, W]}``."""
        channel = self.channelattention(x)
        return {"channel": channel, "spatial": self.spatialattention(x * channel)}
