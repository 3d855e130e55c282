"""Self-attention over a map as a convolution leaves it, with keys narrower than values.

The ops of self-attention serve: queries, keys and values are copied side by side, the narrower ones with zeros. The
map, the result and the logarithms of the softmax sums are saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.map_attention import packed_rows, rows_to_map
from . import flops
from .declare import composed_op
from .layout import memory_format, to_map
from .library import define
from .self_attention import attention_bwd, attention_fwd
from .shapes import Arguments


def _map_attention_fwd_reference(qkv: Tensor, heads: int, key_width: int, scale: float) -> tuple[Tensor, Tensor]:
    rows, lse = attention_fwd(packed_rows(qkv, heads, key_width), None, None, scale)
    width = qkv.shape[1] // heads - 2 * key_width
    return rows_to_map(rows[..., :width], qkv).contiguous(memory_format=memory_format(qkv)), lse


def _map_attention_bwd_reference(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, key_width: int, scale: float
) -> Tensor:
    width = qkv.shape[1] // heads - 2 * key_width
    rows = packed_rows(qkv, heads, key_width)
    upstream, result = (_as_rows(t, rows) for t in (grad, out))
    packed, _ = attention_bwd(upstream, rows, None, None, result, lse, scale)
    parts = zip(packed.unbind(3), (key_width, key_width, width), strict=True)
    dqkv = torch.cat([part[..., :w] for part, w in parts], 4)
    return to_map(rows_to_map(dqkv, qkv), qkv)


def _as_rows(t: Tensor, rows: Tensor) -> Tensor:
    """Returns a map ``[N, heads D, H, W]`` as rows ``[N, H W, 1, heads, width]``, the missing channels zero."""
    n, length, _, _, heads, width = rows.shape
    tokens = t.permute(0, 2, 3, 1).reshape(n, length, 1, heads, t.shape[1] // heads)
    return F.pad(tokens, (0, width - tokens.shape[4])) if tokens.shape[4] < width else tokens.contiguous()


def _empty_out(given: Arguments) -> Tensor:
    qkv, heads, key_width = given["qkv"], given["heads"], given["key_width"]
    n, c, height, width = qkv.shape
    sizes = (n, c - 2 * heads * key_width, height, width)
    return torch.empty(sizes, dtype=qkv.dtype, device=qkv.device, memory_format=memory_format(qkv))


_QKV = {
    "heads": "1..",
    "key_width": "1..",
    "qkv": "N heads*(2*key_width+d) H W : floating strided",
    "d": "1..",
}
map_attention_fwd = define(
    "map_attention_fwd(Tensor qkv, int heads, int key_width, float scale) -> (Tensor out, Tensor lse)",
    None,
    _map_attention_fwd_reference,
    (_empty_out, "N heads H*W"),
    _QKV,
    flops_of=lambda *args: flops.count(_mathematics, *args),
)
map_attention_bwd = define(
    "map_attention_bwd(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int heads, int key_width, float scale)"
    " -> Tensor dqkv",
    None,
    _map_attention_bwd_reference,
    ("like qkv",),
    {
        **_QKV,
        "grad": "N heads*d H W : qkv strided",
        "out": "N heads*d H W : qkv strided",
        "lse": "N heads H*W",
    },
    flops_of=lambda grad, qkv, out, lse, *options: flops.count_gradient(_mathematics, (qkv, *options)),
)


def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any) -> tuple[Tensor]:
    return (map_attention_bwd(grad, *tensors, *small, *options),)


def _mathematics(qkv: Tensor, heads: int, key_width: int, scale: float) -> Tensor:
    return reference.map_attention(qkv, heads, key_width, 1, scale)


MAP_ATTENTION = composed_op(
    "map_attention",
    map_attention_fwd,
    _gradients,
    _mathematics,
    saves_result=True,
    tiny=196,
    pixels=(2, 3),
    in_torch="cpu",
)
