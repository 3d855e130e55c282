"""Attention inside (shifted) windows: launchers; see `ops.window_attention`."""

from __future__ import annotations

import torch

from ..attention.window_bwd import attend_windows_bwd
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


def window_attention_bwd(
    grad: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes dqkv, dbias, dtable. If one kernel does all, reads grad and qkv once, writes dqkv once.

    Raises:
        ValueError: windows of more than 256 tokens.
    """
    with device_guard(qkv):
        x = prepare(qkv, bias, table, heads, window_h, window_w, shift_h, shift_w, scale, pad_first)
        return attend_windows_bwd(grad.contiguous(), x)
