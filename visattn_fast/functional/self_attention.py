"""Attention over the positions of a map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..backends import fused, is_tiny, reference_asked
from ..reference.self_attention import check_attention2d, relative_bias, split_heads
from ._gated import TINY


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
    own = fused(qkv) or (qkv.is_cpu and not reference_asked())  # on CPUs the ops are PyTorch's operations
    tiny = is_tiny(qkv.shape[1] * qkv.shape[2], TINY[reference.attention2d])
    if need_weights == "full" or tiny or reference_asked() or not (own or need_weights == "none"):
        return reference.attention2d(qkv, table, key_mask, scale, need_weights)
    if not own:
        return _scaled_dot_product(qkv, table, key_mask, scale), None
    out, lse = ops.run(ops.Attention2dFunction, qkv, table, key_mask, scale)
    if need_weights == "none":
        return out, None
    tensors = (None if t is None else t.detach() for t in (qkv, table, key_mask, lse))
    return out, ops.attention_mean(*tensors, scale).to(qkv.dtype)


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
