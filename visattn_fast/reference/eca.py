"""Efficient channel attention in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import SAME_SIZE_1D_WITHOUT_BIAS, Layers, has_plain_layers
from .checks import check_channel_kernel, check_feature_map, check_odd, check_positive
from .parameter_access import child, parameter
from .positions import over_positions

__all__ = ["ECA", "eca"]


@over_positions
def eca(x: Tensor, weight: Tensor) -> Tensor:
    """``x * sigmoid(conv1d(mean(x)))``, the mean over H and W, the convolution along C with zero padding.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[1, 1, k]`` with odd k.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an even k.
        TypeError: a dtype that is not floating-point.
    """
    return x * eca_gate(x, weight)


def eca_gate(x: Tensor, weight: Tensor) -> Tensor:
    """The gate that `eca` multiplies x by, ``[N, C, 1, 1]``."""
    check_channel_kernel(x, weight)
    gate = torch.sigmoid(F.conv1d(x.mean((2, 3))[:, None], weight, padding=weight.shape[2] // 2))
    return gate[:, 0, :, None, None]


def eca_kernel_size(channels: int, gamma: int = 2, b: int = 1) -> int:
    """ECA's adaptive kernel size: ``int(abs((log2(C) + b) / gamma))``, plus one if that is even."""
    size = int(abs((math.log2(channels) + b) / gamma))
    return size if size % 2 else size + 1


class ECA(nn.Module):
    """Efficient channel attention (Wang et al., "ECA-Net", CVPR 2020).

    ``y = x * sigmoid(conv1d_k(mean(x)))``: x and y ``[N, C, H, W]``, the mean over H and W, the convolution along C
    with zero padding and without bias.

    Args:
        channels: C.
        gamma, b: k is ``int(abs((log2 C + b) / gamma))``, plus one if that is even.
        kernel_size: k itself, odd; overrides gamma and b.

    Raises:
        ValueError: a non-positive argument, an even ``kernel_size``.

    ``state_dict``: ``conv.weight`` ``[1, 1, k]``.
    """

    LAYERS = Layers({"conv": SAME_SIZE_1D_WITHOUT_BIAS})

    def __init__(self, channels: int, gamma: int = 2, b: int = 1, kernel_size: int | None = None) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("gamma", gamma)
        if kernel_size is None:
            kernel_size = eca_kernel_size(channels, gamma, b)
        check_odd("kernel_size", kernel_size)
        self.channels = channels
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def weights(self) -> tuple[Tensor]:
        """``(weight,)``, as `eca` takes it."""
        return (parameter(child(self, "conv"), "weight"),)

    @over_positions
    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return x * self.gate(x.mean((2, 3), keepdim=True))

    def gate(self, mean: Tensor) -> Tensor:
        """The gate from the means over H and W: ``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``."""
        logit: Tensor = self.conv(mean[:, None, :, 0, 0])
        return torch.sigmoid(logit)[:, 0, :, None, None]

    def check(self, x: Tensor) -> None:
        """Raises unless x is a feature map on the device of the weight. The convolution fits any number of channels."""
        if has_plain_layers(self, x, self.LAYERS):
            check_channel_kernel(x, *self.weights())
        else:
            check_feature_map(x)

    @over_positions
    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of x: ``{"channel": [N, C, 1, 1]}``."""
        self.check(x)
        return {"channel": self.gate(x.mean((2, 3), keepdim=True))}

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
