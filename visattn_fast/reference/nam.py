"""Normalization-based attention in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_feature_map, check_positive, check_positive_number, check_weight


def check_nam(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, eps: float
) -> None:
    """Raises unless the weights and statistics are ``[C]``, as x has channels, and there is a variance to be had."""
    check_feature_map(x)
    check_positive_number("eps", eps)
    check_weight("weight", weight, (x.shape[1],), x)
    check_weight("bias", bias, (x.shape[1],), x)
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is not None:
            check_weight(name, value, (x.shape[1],), x)
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if not training and (mean is None or var is None):
        raise ValueError("running_mean and running_var must be given outside of training")


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
    """``x * sigmoid(bn(x) * abs(weight) / sum(abs(weight)))``; no gradient goes through the quotient.

    Args:
        x: ``[N, C, H, W]``.
        weight, bias, running_mean, running_var, training, momentum, eps: of the batch norm, as in `F.batch_norm`.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, a single value per channel in training.
        TypeError: a dtype that is not floating.
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
    """What `nam` multiplies x by, ``[N, C, H, W]``."""
    check_nam(x, weight, bias, running_mean, running_var, training, eps)
    share = weight.detach().abs()
    share = share / share.sum()
    normed = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return torch.sigmoid(normed * share[:, None, None])


class NAM(nn.Module):
    """Normalization-based attention, its channel part (Liu et al., "NAM", NeurIPS workshops 2021): see `nam`.

    Args:
        channels: C.

    Raises:
        ValueError: a non-positive argument.

    ``state_dict``: ``bn2``, a BatchNorm2d.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        check_feature_map(x, self.bn2.num_features)
        check_weight("weight", self.bn2.weight, (self.bn2.num_features,), x)
        share = self.bn2.weight.detach().abs()
        return x * torch.sigmoid(self.bn2(x) * (share / share.sum())[:, None, None])

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """``{"element": [N, C, H, W]}``: the gate of every element of x. Running statistics are not touched."""
        check_feature_map(x, self.bn2.num_features)
        bn = self.bn2
        batch = bn.training or bn.running_mean is None
        statistics = (None, None) if batch else (bn.running_mean, bn.running_var)
        return {"element": nam_gate(x, bn.weight, bn.bias, *statistics, batch, 0.0, bn.eps)}
