"""What a module that computes its batch norm itself does as ``nn.BatchNorm2d`` does: mode, momentum, averages."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(NamedTuple):
    """A batch norm by its running statistics, ``(z - running_mean) / sqrt(running_var + eps) * weight + bias``.

    Each tensor is ``[C]``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def apply(self, z: Tensor) -> Tensor:
        """``z`` normed, in PyTorch."""
        return F.batch_norm(z, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def batch_norm_step(bn: nn.modules.batchnorm._BatchNorm) -> tuple[bool, float]:
    """Whether this forward pass of ``bn`` takes the batch's statistics, and the momentum of their running averages.

    Counts the batch in training, as ``bn``'s own forward does; without a momentum the average is cumulative.

    Raises:
        RuntimeError: ``bn`` would take the statistics of several processes, as SyncBatchNorm does.
    """
    if isinstance(bn, nn.SyncBatchNorm) and bn.training and _several_processes():
        raise RuntimeError(
            "SyncBatchNorm: this module computes its batch norm itself, from the batch of its own process; "
            "leave it out of convert_sync_batchnorm, or put its batch norm in eval mode"
        )
    if not (bn.training and bn.track_running_stats):
        return bn.training or bn.running_mean is None, 0.0
    assert bn.num_batches_tracked is not None
    bn.num_batches_tracked.add_(1)
    return True, bn.momentum if bn.momentum is not None else 1.0 / float(bn.num_batches_tracked)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """``running = (1 - momentum) running + momentum statistic``, in place; the variance without its bias.

    Args:
        running_mean, running_var: ``[C]``; None: nothing to do.
        mean, var: of the batch, ``[C]``; var is the biased one, the mean square deviation.
        count: the number of values behind each.
    """
    if running_mean is not None and running_var is not None and momentum:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / max(count - 1, 1))


def look_through(bn: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """``bn(x)`` in the mode that it is in, without counting the batch or touching its running statistics."""
    batch = bn.training or bn.running_mean is None
    statistics = (None, None) if batch else (bn.running_mean, bn.running_var)
    return F.batch_norm(x, *statistics, bn.weight, bn.bias, batch, 0.0, bn.eps)
