"""Attention of every head over the positions of a map, from packed queries, keys and values, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_choice, check_floating, check_weight
from .masking import masked_softmax

__all__ = ["attention2d"]

NEED_WEIGHTS = ("none", "mean", "full")


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The bias of every query and key of a map: ``[2H - 1, 2W - 1, heads]`` -> ``[heads, h w, h w]``.

    ``bias[i, j] = table[yi - yj + H - 1, xi - xj + W - 1]``; a map smaller than H x W uses the table's middle.
    """
    rows, columns, heads = table.shape
    y, x = (torch.arange(size, device=table.device) for size in (height, width))
    dy = (y[:, None] - y + rows // 2)[:, None, :, None]
    dx = (x[:, None] - x + columns // 2)[None, :, None, :]
    return table[dy, dx].reshape(height * width, height * width, heads).permute(2, 0, 1)


def attention2d_weights(
    qkv: Tensor, table: Tensor | None = None, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``softmax(scale q k^T + bias)`` over the keys that the mask leaves, ``[N, heads, H W, H W]``."""
    _, height, width, _, _, d = qkv.shape
    q, k, _ = split_heads(qkv, key_mask)
    scores = (q * (d**-0.5 if scale is None else scale)) @ k.mT
    if table is not None:
        scores = scores + relative_bias(table, height, width)
    return masked_softmax(scores, None if key_mask is None else key_mask.flatten(1)[:, None, None])


def attention2d(
    qkv: Tensor,
    table: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale q k^T + bias) v`` of every head over the positions of a map.

    Args:
        qkv: queries, keys and values side by side, ``[N, H, W, 3, heads, d]``.
        table: relative position bias, ``[2H' - 1, 2W' - 1, heads]`` with ``H' >= H`` and ``W' >= W``:
            ``bias[i, j] = table[yi - yj + H' - 1, xi - xj + W' - 1]``.
        key_mask: bool, ``[N, H, W]``; True: the position is attended to. What keys and values hold elsewhere, NaN
            included, reaches nothing; where an image has no such position, the result is zeros.
        scale: ``d ** -0.5`` if None.
        need_weights: ``"none"``; ``"mean"``: the mean weight of every position over all queries, a heat map without
            gradients; or ``"full"``: all weights.

    Returns:
        ``[N, H, W, heads, d]``, and None, ``[N, heads, H, W]`` or ``[N, heads, H W, H W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown ``need_weights``.
        TypeError: a dtype that does not fit.
    """
    check_attention2d(qkv, table, key_mask, need_weights)
    weights = attention2d_weights(qkv, table, key_mask, scale)
    out = weights.to(qkv.dtype) @ split_heads(qkv, key_mask)[2]
    out = out.transpose(1, 2).unflatten(1, qkv.shape[1:3])
    if need_weights == "mean":
        return out, weights.detach().mean(2).unflatten(2, qkv.shape[1:3])
    return out, weights if need_weights == "full" else None


def split_heads(qkv: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as ``[N, heads, H W, d]``, with zeros as the keys and values that the mask shuts out."""
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    if key_mask is not None:
        unseen = ~key_mask.flatten(1)[:, None, :, None]
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    return q, k, v


def check_attention2d(qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, need_weights: str) -> None:
    """Raises unless qkv is ``[N, H, W, 3, heads, d]``, and table and mask fit it."""
    check_choice("need_weights", need_weights, NEED_WEIGHTS)
    check_floating("qkv", qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3 or 0 in qkv.shape[1:]:
        raise ValueError(f"qkv must have shape [N, H, W, 3, heads, d], got {list(qkv.shape)}")
    n, height, width, _, heads, _ = qkv.shape
    if table is not None:
        check_floating("table", table)
        if table.dim() != 3 or table.shape[0] % 2 == 0 or table.shape[1] % 2 == 0:
            raise ValueError(f"table must have shape [2H - 1, 2W - 1, heads], got {list(table.shape)}")
        check_weight("table", table, (*table.shape[:2], heads), qkv)
        if table.shape[0] < 2 * height - 1 or table.shape[1] < 2 * width - 1:
            limits = f"{table.shape[0] // 2 + 1} x {table.shape[1] // 2 + 1}"
            raise ValueError(f"the position bias is for maps of up to {limits} positions, got {height} x {width}")
    if key_mask is not None:
        _check_key_mask(key_mask, (n, height, width), qkv)


def _check_key_mask(key_mask: Tensor, shape: tuple[int, ...], qkv: Tensor) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor, True where positions are attended to, got {kind}")
    if tuple(key_mask.shape) != shape:
        raise ValueError(f"key_mask must have shape {list(shape)}, got {list(key_mask.shape)}")
    if key_mask.device != qkv.device:
        raise ValueError(f"key_mask must be on the device of x, {qkv.device}, got {key_mask.device}")
