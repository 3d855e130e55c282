"""Attention over the positions of a map: launcher of the gradients; see `ops.self_attention`."""

from __future__ import annotations

import torch

from ..attention.flash import prepare
from ..attention.flash_bwd import flash_attention_bwd, table_grad
from ..core.launch import device_guard


def attention_bwd(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    table: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dqkv, like qkv and dense, and dtable, like the table; dtable is empty without a table."""
    with device_guard(qkv):
        dqkv, offset_grads = flash_attention_bwd(grad.contiguous(), prepare(qkv, table, scale), key_mask, out, lse)
        return dqkv, offset_grads if table is None else table_grad(offset_grads, table)
