"""Attention over the positions of a map, without its map of weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import decide, reference_asked
from ..ops.self_attention import ATTENTION2D, attention_mean
from ..ops.token_grid import in_format_of, token_grid
from ..reference.self_attention import check_attention2d, relative_bias, split_heads

__all__ = ["FastSelfAttention2d", "attention2d"]


def attention2d(
    qkv: Tensor,
    table: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale q k^T + bias) v`` for every head, over the positions of a map; on request, also its weights.

    Neither the weights nor the bias ``[heads, H W, H W]`` are stored, forward or backward. Exceptions: if all weights
    are asked for, or a tiny map is compiled (docs/guide/compile.md), the reference serves. The mean weights take one
    more pass over queries and keys.

    Args:
        qkv: queries, keys and values side by side, ``[N, H, W, 3, heads, d]``, any floating dtype.
        table: relative position bias, ``[2H' - 1, 2W' - 1, heads]`` with ``H' >= H`` and ``W' >= W``:
            ``bias[i, j] = table[yi - yj + H' - 1, xi - xj + W' - 1]``. Its gradient is deterministic.
        key_mask: bool, ``[N, H, W]``; True: queries attend to this position. Keys and values elsewhere may hold
            anything, even NaN, without effect on results or gradients. An image without any True gives zeros.
        scale: ``d ** -0.5`` if None.
        need_weights: ``"none"``; ``"mean"``: the mean weight of each position over all queries, a heat map without
            gradients; or ``"full"``: all weights.

    Returns:
        ``[N, H, W, heads, d]`` in qkv's dtype, and None, ``[N, heads, H, W]`` or ``[N, heads, H W, H W]``.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit, an unknown ``need_weights``.
        RuntimeError: the backend asked for cannot serve this call.

    Sources: Vaswani et al., "Attention is all you need", NeurIPS 2017; Dao, "FlashAttention-2", 2023; the bias: Liu et
    al., "Swin Transformer", ICCV 2021.
    """
    check_attention2d(qkv, table, key_mask, need_weights)
    scale = float(qkv.shape[5] ** -0.5 if scale is None else scale)
    decision = decide(qkv, ATTENTION2D)
    if decision.fallback and need_weights == "none":
        return _scaled_dot_product(qkv, table, key_mask, scale), None
    if need_weights == "full" or not decision.fused:
        return reference.attention2d(qkv, table, key_mask, scale, need_weights)
    out, lse = ATTENTION2D(qkv, table, key_mask, scale)
    if need_weights == "none":
        return out, None
    tensors = (None if t is None else t.detach() for t in (qkv, table, key_mask, lse))
    return out, attention_mean(*tensors, scale).to(qkv.dtype)


def _scaled_dot_product(qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    """Computes it with PyTorch's function and the expanded bias. Not every device has its double backward."""
    q, k, v = split_heads(qkv, key_mask)
    bias = None if table is None else relative_bias(table, *qkv.shape[1:3])[None].to(qkv.dtype)
    if key_mask is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        keys = key_mask.flatten(1)[:, None, None]  # [N, 1, 1, L]
        seeing = keys.any(3, keepdim=True)
        kept = keys | ~seeing  # kernels need a key in every row: rows without one keep all, and become 0
        bias = kept if bias is None else bias.masked_fill(~kept, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).masked_fill(~seeing, 0.0)
    return out.transpose(1, 2).unflatten(1, qkv.shape[1:3])


class FastSelfAttention2d(reference.SelfAttention2d):
    """Fused `reference.SelfAttention2d`: same constructor, same ``state_dict``, same result.

    The attention is one op per direction and stores no map of weights. The linear layers are PyTorch's, and hooks on
    them run.
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: str = "none") -> Any:
        """Returns what `reference.SelfAttention2d` does, in x's memory format; see `attention2d`."""
        self.check(x, need_weights)
        grid = x.permute(0, 2, 3, 1) if reference_asked() else token_grid(x)
        out, weights = attention2d(self.project(grid), self.table(), key_mask, need_weights=need_weights)
        y = in_format_of(x, self.merge(out, grid))
        return y if weights is None else (y, weights)
