"""Batch norm for modules that compute it themselves: mode, momentum and running statistics as in ``nn.BatchNorm2d``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(NamedTuple):
    """A batch norm with running statistics: ``(z - running_mean) / sqrt(running_var + eps) * weight + bias``.

    Each tensor is ``[C]``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def apply(self, z: Tensor) -> Tensor:
        """Normalises ``z``, ``[N, C, H, W]``, in plain PyTorch."""
        return F.batch_norm(z, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def batch_norm_step(bn: nn.modules.batchnorm._BatchNorm) -> tuple[bool, float]:
    """Counts the batch in training, as a forward pass of ``bn`` does. Returns how this pass must normalise.

    Returns:
        True if it takes the batch's statistics, else False; and the momentum of the running statistics. Without a
        momentum in ``bn`` their average is cumulative; without a count of batches too, they stay as they are.
    """
    if not (bn.training and bn.track_running_stats):
        return bn.training or bn.running_mean is None, 0.0
    count = bn.num_batches_tracked
    if count is not None:
        count.add_(1)
    if bn.momentum is not None:
        return True, bn.momentum
    return True, 0.0 if count is None else 1.0 / float(count)


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """``running = (1 - momentum) running + momentum statistic``, in place, with the unbiased variance.

    Args:
        running_mean, running_var: ``[C]``; None: nothing is updated.
        mean, var: statistics of the batch, ``[C]``; var is biased, the mean square deviation.
        count: number of values per channel.
        momentum: weight of the batch; 0: nothing is updated.
    """
    if running_mean is not None and running_var is not None and momentum:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / max(count - 1, 1))


def look(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``; a batch norm neither counts the batch nor updates its running statistics."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return batch_norm_without_update(layer, x)
    y: Tensor = layer(x)
    return y


def batch_norm_without_update(bn: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """``bn(x)`` in its present mode, without counting the batch and without updating the running statistics."""
    batch = bn.training or bn.running_mean is None
    statistics = (None, None) if batch else (bn.running_mean, bn.running_var)
    return F.batch_norm(x, *statistics, bn.weight, bn.bias, batch, 0.0, bn.eps)
