"""The epilogue of a gate in a residual block: add the shortcut, then activate."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["epilogue"]


def epilogue(gated: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``act(gated + residual)``, the end of a residual block.

    Args:
        gated: the gated map, ``[N, C, H, W]``.
        residual: a tensor of the same shape; None: nothing is added.
        activation: None, ``"relu"`` or ``"silu"``.
    """
    out = gated if residual is None else gated + residual
    if activation == "relu":
        return F.relu(out)
    if activation == "silu":
        return F.silu(out)
    return out
