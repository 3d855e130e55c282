"""Coordinate attention in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import BATCH_NORM, POINTWISE, Layers, has_plain_layers
from .batch_norm import look
from .checks import check_coordinate_gates, check_feature_map, check_positive
from .parameter_access import child, weight_and_bias

__all__ = ["CoordAtt", "coord_att"]


def coord_att(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``x * sigmoid(w_w a_w + b_w) * sigmoid(w_h a_h + b_h)`` with ``[a_h, a_w] = hardswish(bn(w1 m + b1))``.

    m holds the means over W, one for each row, followed by the means over H, one for each column.

    Args:
        x: ``[N, C, H, W]``.
        w1, b1: ``[M, C]`` (or, as a 1x1 convolution, ``[M, C, 1, 1]``) and ``[M]`` or None.
        bn_weight, bn_bias, running_mean, running_var: parameters and statistics of the batch norm, ``[M]`` or None.
        w_h, b_h, w_w, b_w: ``[C, M]`` (or ``[C, M, 1, 1]``) and ``[C]`` or None.
        training: normalise with the batch's statistics and update the running ones in place.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit; no running statistics outside training.
        TypeError: a dtype that is not floating-point.
    """
    weights = (w1, b1, bn_weight, bn_bias, running_mean, running_var, w_h, b_h, w_w, b_w)
    height, width = coordinate_gates(x, *weights, training, momentum, eps)
    return x * width * height


def coordinate_gates(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The gates that `coord_att` multiplies x by, ``[N, C, H, 1]`` and ``[N, C, 1, W]``."""
    check_coordinate_gates(x, w1, b1, bn_weight, bn_bias, running_mean, running_var, w_h, b_h, w_w, b_w, training)
    means = torch.cat([x.mean(3), x.mean(2)], 2)
    z = F.conv1d(means, w1.flatten(1)[:, :, None], b1)
    z = F.batch_norm(z, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    height, width = F.hardswish(z).split([x.shape[2], x.shape[3]], 2)
    height = torch.sigmoid(F.conv1d(height, w_h.flatten(1)[:, :, None], b_h))
    width = torch.sigmoid(F.conv1d(width, w_w.flatten(1)[:, :, None], b_w))
    return height[:, :, :, None], width[:, :, None]


class CoordAtt(nn.Module):
    """Coordinate attention (Hou et al., "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021).

    ``y = x * sigmoid(conv_w(a_w)) * sigmoid(conv_h(a_h))`` with ``[a_h, a_w] = hardswish(bn1(conv1(m)))``. m joins the
    means over W, ``[N, C, H, 1]``, and over H, ``[N, C, W, 1]``, along dimension 2; ``hardswish(v) = v relu6(v + 3) /
    6``. Convolutions are 1x1, with bias.

    Args:
        in_channels: C.
        out_channels: None or C, since the gates multiply x; an argument because the original has it.
        reduction: the hidden layer has ``max(8, C // reduction)`` channels.

    Raises:
        ValueError: a non-positive argument, or ``out_channels`` other than ``in_channels``.

    ``state_dict``: ``conv1.weight`` ``[M, C, 1, 1]``, ``conv1.bias``, ``bn1.*`` as in ``nn.BatchNorm2d(M)``,
    ``conv_h.weight`` and ``conv_w.weight`` ``[C, M, 1, 1]``, ``conv_h.bias``, ``conv_w.bias``.
    """

    LAYERS = Layers({"conv1": POINTWISE, "bn1": BATCH_NORM, "conv_h": POINTWISE, "conv_w": POINTWISE})

    def __init__(self, in_channels: int, out_channels: int | None = None, reduction: int = 32) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("reduction", reduction)
        if out_channels not in (None, in_channels):
            raise ValueError(
                f"out_channels must be in_channels={in_channels} or None: the gates multiply x, got {out_channels!r}"
            )
        hidden = max(8, in_channels // reduction)
        self.channels, self.reduction = in_channels, reduction
        self.conv1 = nn.Conv2d(in_channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv_h = nn.Conv2d(hidden, in_channels, 1)
        self.conv_w = nn.Conv2d(hidden, in_channels, 1)

    def weights(self) -> tuple[Any, ...]:
        """``(w1, ..., b_w)``, as `coord_att` takes them."""
        conv1, bn, conv_h, conv_w = (child(self, name) for name in ("conv1", "bn1", "conv_h", "conv_w"))
        norm = *weight_and_bias(bn), bn.running_mean, bn.running_var
        return *weight_and_bias(conv1), *norm, *weight_and_bias(conv_h), *weight_and_bias(conv_w)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        height, width = self._gates(x, self.bn1)
        return x * width * height

    def _gates(self, x: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The gates of x, ``[N, C, H, 1]`` and ``[N, C, 1, W]``."""
        means = torch.cat([x.mean(3, keepdim=True), x.mean(2)[:, :, :, None]], 2)  # [N, C, H + W, 1]
        height, width = F.hardswish(norm(self.conv1(means))).split([x.shape[2], x.shape[3]], 2)
        return torch.sigmoid(self.conv_h(height)), torch.sigmoid(self.conv_w(width.transpose(2, 3)))

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the layers, before the batch norm counts the batch."""
        if has_plain_layers(self, x, self.LAYERS):
            batch = self.bn1.training or self.bn1.running_mean is None
            check_coordinate_gates(*(x, *self.weights(), batch))
        else:
            check_feature_map(x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gates of x: ``{"height": [N, C, H, 1], "width": [N, C, 1, W]}``. Running statistics stay as they are."""
        self.check(x)
        height, width = self._gates(x, lambda z: look(self.bn1, z))
        return {"height": height, "width": width}

    def extra_repr(self) -> str:
        return f"in_channels={self.channels}, reduction={self.reduction}"
