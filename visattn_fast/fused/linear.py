"""The linear layer of token modules."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference_asked
from ..ops import linear as op


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, ``x @ weight.T + bias``, faster for large float32 products on CPUs.

    There, outside of autocast, oneDNN computes it; everywhere else PyTorch does.

    Args:
        x: tokens, ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]`` or None.

    Returns:
        ``[..., M]``.
    """
    return torch.nn.functional.linear(x, weight, bias) if reference_asked() else op.linear(x, weight, bias)
