"""Attention over the positions of a map without its map of weights: launchers; see `ops.self_attention`."""

from __future__ import annotations

import torch

from ..attention.flash import prepare
from ..attention.flash_bwd import flash_attention_bwd, table_grad
from ..attention.flash_fwd import flash_attention, mean_weights
from ..core.launch import device_guard


def attention_fwd(
    qkv: torch.Tensor, table: torch.Tensor | None, key_mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes out [N, H, W, heads, d] and lse [N, heads, H * W].

    Raises:
        ValueError: heads of more than 128.
    """
    N, H, W, _, heads, D = qkv.shape
    with device_guard(qkv):
        out, lse = flash_attention(prepare(qkv, table, scale), key_mask)
        return out.view(N, H, W, heads, D), lse


def attention_mean(
    qkv: torch.Tensor, table: torch.Tensor | None, key_mask: torch.Tensor | None, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """Computes the mean weight of every position, [N, heads, H, W]."""
    N, H, W, _, heads, _ = qkv.shape
    with device_guard(qkv):
        return mean_weights(prepare(qkv, table, scale), key_mask, lse).view(N, heads, H, W)


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
