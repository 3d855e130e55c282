"""Concurrent spatial and channel squeeze-and-excitation in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import MEAN, POINTWISE, RELU, SIGMOID, Layers, container, has_plain_layers
from .checks import check_bottleneck, check_feature_map, check_weight, hidden_width
from .parameter_access import child, weight_and_bias
from .positions import over_positions
from .se import se_gate

__all__ = ["scSE", "scse"]


@over_positions
def scse(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, ws: Tensor, bs: Tensor | None
) -> Tensor:
    """``x * (sigmoid(w2 relu(w1 mean(x) + b1) + b2) + sigmoid(ws x + bs))``, the mean over H and W, ``ws x`` per pixel.

    Args:
        x: ``[N, C, H, W]``.
        w1, b1: squeeze, ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: excitation, ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.
        ws, bs: spatial gate, ``[1, C]`` (or ``[1, C, 1, 1]``) and ``[1]`` or None.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    channel, spatial = scse_gates(x, w1, b1, w2, b2, ws, bs)
    return x * (channel + spatial)


def scse_gates(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, ws: Tensor, bs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gates that `scse` adds: ``[N, C, 1, 1]`` and ``[N, 1, H, W]``."""
    check_scse(x, w1, b1, w2, b2, ws, bs)
    return se_gate(x, w1, b1, w2, b2), torch.sigmoid(F.conv2d(x, ws.flatten(1)[:, :, None, None], bs))


def check_scse(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, ws: Tensor, bs: Tensor | None
) -> None:
    """Raises unless the arguments of `scse` fit each other."""
    check_bottleneck(x, w1, b1, w2, b2)
    check_weight("ws", ws, (1, x.shape[1]), x)
    if bs is not None:
        check_weight("bs", bs, (1,), x)


class scSE(nn.Module):
    """Concurrent spatial and channel squeeze-and-excitation (Roy et al., MICCAI 2018).

    ``y = x * (channel + spatial)``: x and y ``[N, C, H, W]``; ``channel = sigmoid(W2 relu(W1 mean(x) + b1) + b2)``,
    the mean over H and W; ``spatial = sigmoid(w x + b)``, a 1x1 convolution to one channel. Layers are named as in
    segmentation-models-pytorch's ``SCSEModule``.

    Args:
        channels: C.
        reduction: the hidden layer has ``channels // reduction`` units.

    Raises:
        ValueError: a non-positive argument, or fewer channels than ``reduction``.

    ``state_dict``: ``cSE.1.weight`` ``[R, C, 1, 1]``, ``cSE.3.weight`` ``[C, R, 1, 1]``, ``sSE.0.weight``
    ``[1, C, 1, 1]``, and their biases.
    """

    LAYERS = Layers(
        {
            "cSE": container(nn.Sequential, 5),
            "cSE.0": MEAN,
            "cSE.1": POINTWISE,
            "cSE.2": RELU,
            "cSE.3": POINTWISE,
            "cSE.4": SIGMOID,
            "sSE": container(nn.Sequential, 2),
            "sSE.0": POINTWISE,
            "sSE.1": SIGMOID,
        }
    )

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def weights(self) -> tuple[Any, ...]:
        """``(w1, b1, w2, b2, ws, bs)``, as `scse` takes them."""
        _, squeeze, _, excite, _ = child(self, "cSE")
        spatial, _ = child(self, "sSE")
        return *weight_and_bias(squeeze), *weight_and_bias(excite), *weight_and_bias(spatial)

    @over_positions
    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return x * (self.cSE(x) + self.sSE(x))

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the layers."""
        if has_plain_layers(self, x, self.LAYERS):
            check_scse(x, *self.weights())
        else:
            check_feature_map(x)

    @over_positions
    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """Both gates of x: ``{"channel": [N, C, 1, 1], "spatial": [N, 1, H, W]}``."""
        self.check(x)
        return {"channel": self.cSE(x), "spatial": self.sSE(x)}
