"""Self-attention over a map as a convolution leaves it, without its map of weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import decide
from ..ops.map_attention import MAP_ATTENTION
from ..reference.map_attention import check_map_attention, join_areas, split_areas, split_map

__all__ = ["FastMapAttention2d", "map_attention"]


def map_attention(qkv: Tensor, heads: int, key_width: int, areas: int = 1, scale: float | None = None) -> Tensor:
    """``v softmax(scale q^T k)^T`` for every head, over the positions of a map or of each of its areas.

    The weights ``[heads, H W, H W]`` are not stored, forward or backward. The kernels of `attention2d` serve.

    Args:
        qkv: ``[N, heads (2 K + D), H, W]``, NCHW or channels_last, any floating dtype; each head has K channels of
            queries, K of keys and D of values.
        heads: number of attention heads.
        key_width: K.
        areas: positions attend to positions of their own area alone: a span of ``H W / areas`` positions, row by row.
        scale: ``K ** -0.5`` if None.

    Returns:
        ``[N, heads D, H, W]`` in qkv's dtype and memory format.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: sizes that do not fit.
        RuntimeError: the backend asked for cannot serve this call.

    Sources: Wang et al., "YOLOv10", NeurIPS 2024; areas: Tian et al., "YOLOv12", NeurIPS 2025; Dao, "FlashAttention-2",
    2023.
    """
    check_map_attention(qkv, heads, key_width, areas)
    scale = float(key_width**-0.5 if scale is None else scale)
    by_area = split_areas(qkv, areas)
    decision = decide(by_area, MAP_ATTENTION)
    if decision.fused:
        out, _ = MAP_ATTENTION(by_area, heads, key_width, scale)
    elif decision.fallback:
        out = _scaled_dot_product(by_area, heads, key_width, scale)
    else:
        return reference.map_attention(qkv, heads, key_width, areas, scale)
    return join_areas(out, qkv, areas)


def _scaled_dot_product(qkv: Tensor, heads: int, key_width: int, scale: float) -> Tensor:
    """Computes it with PyTorch's function. Not every device has its double backward."""
    q, k, v = (t.mT for t in split_map(qkv.flatten(2), heads, key_width))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).mT.flatten(1, 2)


class FastMapAttention2d(reference.MapAttention2d):
    """Fused `reference.MapAttention2d`: same constructor, same ``state_dict``, same result.

    The attention stores no map of weights. The convolutions and batch norms are PyTorch's, and hooks on them run.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Every position attends to all positions of its area: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        qkv = self.qkv(x)
        return self.merge(x, qkv, map_attention(qkv, self.heads, self.key_width, self.areas))
