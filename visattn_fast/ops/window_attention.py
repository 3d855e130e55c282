"""Attention inside (shifted) windows. Only the arguments are saved: backward computes the weights again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.window_attention import join_windows, split_windows, window_weights
from ..reference.window_geometry import Windows, relative_position
from . import flops
from .declare import composed_op
from .layout import accumulation_dtype, empty_small, zeros_small
from .library import define


def _windows(
    qkv: Tensor, window_h: int, window_w: int, shift_h: int, shift_w: int, scale: float, pad_first: bool
) -> tuple[Windows, float]:
    return Windows(qkv.shape[1], qkv.shape[2], (window_h, window_w), (shift_h, shift_w), bool(pad_first)), scale


def _empty_out(qkv: Tensor) -> Tensor:
    n, height, width, channels = qkv.shape
    return empty_small(qkv, n, height, width, channels // 3, dtype=qkv.dtype)


def _window_attention_fwd_reference(
    qkv: Tensor, bias: Tensor | None, table: Tensor, heads: int, *geometry: Any
) -> Tensor:
    (windows, scale), a = _windows(qkv, *geometry), accumulation_dtype(qkv)
    q, k, v = split_windows(qkv.to(a), bias, heads, windows)
    out = join_windows(window_weights(q, k, table.to(a), windows, scale) @ v, windows)
    return _empty_out(qkv).copy_(out)


def _window_attention_bwd_reference(
    grad: Tensor, qkv: Tensor, bias: Tensor | None, table: Tensor, heads: int, *geometry: Any
) -> tuple[Tensor, ...]:
    (windows, scale), a = _windows(qkv, *geometry), accumulation_dtype(qkv)
    q, k, v = split_windows(qkv.to(a), bias, heads, windows)
    p = window_weights(q, k, table.to(a), windows, scale)
    g = grad.to(a).flatten(1, 2)
    tokens = windows.tokens(qkv.device)
    g = torch.cat([g, torch.zeros_like(g[:, :1])], 1)[:, tokens]  # padding sends back no gradient
    g = g.unflatten(3, (heads, -1)).transpose(2, 3)
    dp = g @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    dq, dk, dv = scale * (ds @ k), scale * (ds.mT @ q), p.mT @ g
    dwindows = torch.stack([dq, dk, dv], 2).flatten(2, 3)  # [N, windows, 3 heads, L, d]
    dqkv = join_windows(dwindows, windows).to(qkv.dtype).contiguous()
    dbias = dwindows.sum((0, 1, 3)).flatten() if bias is not None else zeros_small(qkv, qkv.shape[3])
    rows = relative_position(windows.window, qkv.device).flatten()
    dtable = torch.zeros(table.shape, dtype=a, device=table.device)
    dtable.index_add_(0, rows, ds.sum((0, 1)).flatten(1).t())
    return dqkv, dbias, dtable


_GEOMETRY = "int heads, int window_h, int window_w, int shift_h, int shift_w, float scale, int pad_first"
_ARGUMENTS = dict.fromkeys(("heads", "window_h", "window_w"), "1..")
_ARGUMENTS |= {"shift_h": "0..window_h-1", "shift_w": "0..window_w-1", "pad_first": "0..1"}
_ARGUMENTS |= {"qkv": "N H W 3*heads*d : floating strided", "bias": "3*heads*d : floating"}
_ARGUMENTS |= {"table": "(2*window_h-1)*(2*window_w-1) heads : floating"}
window_attention_fwd = define(
    f"window_attention_fwd(Tensor qkv, Tensor? bias, Tensor table, {_GEOMETRY}) -> Tensor out",
    "window_attention",
    _window_attention_fwd_reference,
    ("N H W heads*d : qkv",),
    _ARGUMENTS,
)
window_attention_bwd = define(
    f"window_attention_bwd(Tensor grad, Tensor qkv, Tensor? bias, Tensor table, {_GEOMETRY})"
    " -> (Tensor dqkv, Tensor dbias, Tensor dtable)",
    "window_attention",
    _window_attention_bwd_reference,
    ("N H W 3*heads*d : qkv", "3*heads*d", "shape of table"),
    {**_ARGUMENTS, "grad": "N H W heads*d : qkv strided"},
    flops_of=lambda grad, *args: flops.count_gradient(_mathematics, args),
)


def _forward(qkv: Tensor, bias: Tensor | None, table: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (window_attention_fwd(qkv, bias, table, *options),)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor | None, ...]:
    return window_attention_bwd(grad, *tensors, *options)


def _mathematics(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor,
    heads: int,
    window_h: int,
    window_w: int,
    shift_h: int,
    shift_w: int,
    scale: float,
    pad_first: bool,
) -> Tensor:
    window, shift = (window_h, window_w), (shift_h, shift_w)
    arguments = (bias, table, heads, window, shift, scale, bool(pad_first))
    return reference.window_attention(qkv, *arguments)


WINDOW_ATTENTION = composed_op("window_attention", _forward, _gradients, _mathematics)
