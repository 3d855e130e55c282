"""Normalization-based attention in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_batch_norm, check_feature_map, check_positive, check_weight

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

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        check_feature_map(x, self.bn2.num_features)
        check_weight("weight", self.bn2.weight, (self.bn2.num_features,), x)
        share = self.bn2.weight.detach().abs()
        return x * torch.sigmoid(self.bn2(x) * (share / share.sum())[:, None, None])

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of every element of x: ``{"element": [N, C, H, W]}``. Running statistics stay as they are."""
        check_feature_map(x, self.bn2.num_features)
        bn = self.bn2
        batch = bn.training or bn.running_mean is None
        statistics = (None, None) if batch else (bn.running_mean, bn.running_var)
        return {"element": nam_gate(x, bn.weight, bn.bias, *statistics, batch, 0.0, bn.eps)}
