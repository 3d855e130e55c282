"""Attention inside (shifted) windows: launcher of the forward pass; see `ops.window_attention`."""

from __future__ import annotations

import torch

from ..attention.window_fwd import attend_windows
from ..attention.windows import prepare
from ..core.launch import device_guard


def window_attention_fwd(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: int,
) -> torch.Tensor:
    """Computes out [N, H, W, C]. Writes out once; reads qkv once if one tile has all queries of a window.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    with device_guard(qkv):
        return attend_windows(prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first))
