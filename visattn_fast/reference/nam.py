"""Normalization-based attention in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import AFFINE_BATCH_NORM, Layers, has_plain_layers
from .batch_norm import look
from .checks import check_batch_norm, check_feature_map, check_positive

__all__ = ["NAM", "nam"]


def nam(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``x * sigmoid(bn(x) * abs(weight) / sum(abs(weight)))``; no gradient passes through the quotient.

    Args:
        x: ``[N, C, H, W]``.
        weight, bias, running_mean, running_var, training, momentum, eps: arguments of `F.batch_norm`.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, a single value per channel in training.
        TypeError: a dtype that is not floating-point.
    """
    return x * nam_gate(x, weight, bias, running_mean, running_var, training, momentum, eps)


def nam_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """The gate that `nam` multiplies x by, ``[N, C, H, W]``."""
    check_batch_norm(x, weight, bias, running_mean, running_var, training, eps)
    share = weight.detach().abs()
    share = share / share.sum()
    normed = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.sigmoid(normed * share[:, None, None])


class NAM(nn.Module):
    """The channel part of normalization-based attention (Liu et al., "NAM", NeurIPS workshops 2021): see `nam`.

    Args:
        channels: C.

    Raises:
        ValueError: a non-positive argument.

    ``state_dict``: the batch norm ``bn2.*``.
    """

    LAYERS = Layers({"bn2": AFFINE_BATCH_NORM})

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return x * self.gate(self.bn2(x))

    def gate(self, normed: Tensor) -> Tensor:
        """The gate of the normed map, ``[N, C, H, W]``."""
        share = self.bn2.weight.detach().abs()
        return torch.sigmoid(normed * (share / share.sum())[:, None, None])

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the batch norm, before it counts the batch."""
        if has_plain_layers(self, x, self.LAYERS):
            bn = self.bn2
            check_feature_map(x, bn.num_features)
            batch = bn.training or bn.running_mean is None
            check_batch_norm(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, batch, bn.eps)
        else:
            check_feature_map(x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of every element of x: ``{"element": [N, C, H, W]}``. Running statistics stay as they are."""
        self.check(x)
        return {"element": self.gate(look(self.bn2, x))}
