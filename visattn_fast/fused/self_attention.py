"""Attention over the positions of a map."""

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
    """``softmax(scale q k^T + bias) v`` of every head over the positions of a map, and its weights if asked for.

    No map of weights and no bias ``[heads, H W, H W]`` is made, neither forward nor backward, unless all weights
    are asked for, or a map is tiny and compiled (docs/guide/compile.md): then it is the reference. The mean weights
    take one more pass over queries and keys.

    Args:
        qkv: queries, keys and values side by side, ``[N, H, W, 3, heads, d]``, any floating dtype.
        table: relative position bias, ``[2H' - 1, 2W' - 1, heads]`` with ``H' >= H`` and ``W' >= W``:
            ``bias[i, j] = table[yi - yj + H' - 1, xi - xj + W' - 1]``. Its gradient is deterministic.
        key_mask: bool, ``[N, H, W]``; True: the position is attended to. What keys and values hold elsewhere, NaN
            included, reaches nothing; where an image has no such position, the result is zeros.
        scale: ``d ** -0.5`` if None.
        need_weights: ``"none"``; ``"mean"``: the mean weight of every position over all queries, a heat map without
            gradients; or ``"full"``: all weights.

    Returns:
        ``[N, H, W, heads, d]``, and None, ``[N, heads, H, W]`` or ``[N, heads, H W, H W]``.

    Raises: as `se`.

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
    """By PyTorch's function, for which the bias is expanded. Its double backward: not every device has one."""
    q, k, v = split_heads(qkv, key_mask)
    bias = None if table is None else relative_bias(table, *qkv.shape[1:3])[None].to(qkv.dtype)
    if key_mask is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        keys = key_mask.flatten(1)[:, None, None]  # [N, 1, 1, L]
        seeing = keys.any(3, keepdim=True)
        kept = keys | ~seeing  # a softmax of nothing is left to no kernel
        bias = kept if bias is None else bias.masked_fill(~kept, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).masked_fill(~seeing, 0.0)
    return out.transpose(1, 2).unflatten(1, qkv.shape[1:3])


class FastSelfAttention2d(reference.SelfAttention2d):
    """`reference.SelfAttention2d` without the map of weights: same constructor, same ``state_dict``, same result.

    The linear layers are PyTorch's, and hooks on them run.
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: str = "none") -> Any:
        """See `reference.SelfAttention2d.forward`; in x's memory format. See `attention2d`."""
        self.check(x, need_weights)
        grid = x.permute(0, 2, 3, 1) if reference_asked() else token_grid(x)
        out, weights = attention2d(self.project(grid), self.table(), key_mask, need_weights=need_weights)
        y = in_format_of(x, self.merge(out, grid))
        return y if weights is None else (y, weights)
