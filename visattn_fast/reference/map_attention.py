"""Self-attention over a map as a convolution leaves it, with keys narrower than values, in plain PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import POINTWISE, Layers, container, has_plain_layers
from .batch_norm import look
from .checks import check_feature_map, check_floating, check_odd, check_positive, check_weight
from .self_attention import attention2d

__all__ = ["MapAttention2d", "map_attention"]


def map_attention(qkv: Tensor, heads: int, key_width: int, areas: int = 1, scale: float | None = None) -> Tensor:
    """``v softmax(scale q^T k)^T`` for every head, over the positions of a map or of each of its areas.

    Args:
        qkv: ``[N, heads (2 K + D), H, W]``; each head has K channels of queries, K of keys and D of values.
        heads: number of attention heads.
        key_width: K.
        areas: positions attend to positions of their own area alone: a span of ``H W / areas`` positions, row by row.
        scale: ``K ** -0.5`` if None.

    Returns:
        ``[N, heads D, H, W]``.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: sizes that do not fit.
    """
    check_map_attention(qkv, heads, key_width, areas)
    q, k, v = split_map(split_areas(qkv, areas).flatten(2), heads, key_width)
    weights = ((q * (key_width**-0.5 if scale is None else scale)).mT @ k).softmax(3)
    return join_areas((v @ weights.mT).flatten(1, 2), qkv, areas)


def split_areas(x: Tensor, areas: int) -> Tensor:
    """Moves areas into the batch: ``[N, C, H, W]`` -> ``[N areas, C, H W / areas, 1]``; a single one stays a map."""
    if areas == 1:
        return x
    return x.flatten(2).unflatten(2, (areas, x.shape[2] * x.shape[3] // areas)).transpose(1, 2).flatten(0, 1)[..., None]


def join_areas(y: Tensor, x: Tensor, areas: int) -> Tensor:
    """Undoes `split_areas`: ``[N areas, C, ...]`` -> ``[N, C, H, W]``, of the height and width of x."""
    if areas > 1:
        y = y.flatten(2).unflatten(0, (x.shape[0], areas)).transpose(1, 2)
    return y.flatten(2).unflatten(2, x.shape[2:])


def split_map(tokens: Tensor, heads: int, key_width: int) -> tuple[Tensor, ...]:
    """Splits ``[N, heads (2 K + D), L]`` into queries, keys and values, ``[N, heads, K or D, L]``."""
    per_head = tokens.unflatten(1, (heads, -1))
    return per_head.split([key_width, key_width, per_head.shape[2] - 2 * key_width], 2)


def packed_rows(qkv: Tensor, heads: int, key_width: int) -> Tensor:
    """Packs a map ``[N, heads (2 K + D), H, W]`` for `attention2d`: ``[N, H W, 1, 3, heads, width]``.

    Queries and keys, or values, get zeros up to the width of the wider ones.
    """
    n, channels, height, width = qkv.shape
    tokens = qkv.permute(0, 2, 3, 1).reshape(n, height * width, heads, channels // heads)
    widths = [key_width, key_width, channels // heads - 2 * key_width]
    parts = [F.pad(part, (0, max(widths) - part.shape[3])) for part in tokens.split(widths, 3)]
    return torch.stack(parts, 2)[:, :, None]


def rows_to_map(rows: Tensor, qkv: Tensor) -> Tensor:
    """Returns rows ``[N, H W, 1, heads, d]`` as a map ``[N, heads d, H, W]`` of the size of qkv."""
    return rows.flatten(2).mT.unflatten(2, qkv.shape[2:])


def received(qkv: Tensor, heads: int, key_width: int, areas: int = 1) -> dict[str, Tensor]:
    """``{"received": [N, heads, H, W]}``: the mean weight of each position; over an area the weights sum to 1."""
    check_map_attention(qkv, heads, key_width, areas)
    by_area = split_areas(qkv, areas)
    weights = attention2d(packed_rows(by_area, heads, key_width), None, None, key_width**-0.5, "mean")[1]
    assert weights is not None  # [N areas, heads, L, 1]
    return {"received": join_areas(weights, qkv, areas)}


def map_values(qkv: Tensor, heads: int, key_width: int) -> Tensor:
    """Returns the values of all heads as a map, ``[N, heads D, H, W]``, in qkv's memory format."""
    # A view of one copy of them makes Inductor 2.13 fail before a convolution if sizes are dynamic.
    return torch.cat([head[:, 2 * key_width :] for head in qkv.chunk(heads, 1)], 1)


def check_map_attention(qkv: Tensor, heads: int, key_width: int, areas: int) -> None:
    """Raises unless qkv ``[N, heads (2 K + D), H, W]`` splits into heads, queries, keys, values and areas."""
    check_floating("qkv", qkv)
    if qkv.dim() != 4 or 0 in qkv.shape[1:]:
        raise ValueError(f"qkv must have shape [N, heads (2 K + D), H, W], got {list(qkv.shape)}")
    for name, value in (("heads", heads), ("key_width", key_width), ("areas", areas)):
        check_positive(name, value)
    _, channels, height, width = qkv.shape
    if channels % heads or channels // heads <= 2 * key_width:
        raise ValueError(
            f"qkv must have heads={heads} times more than 2 key_width={2 * key_width} channels, got {channels}"
        )
    if areas > 1 and height * width % areas:
        raise ValueError(f"areas must divide the {height * width} positions of the map, got {areas}")


class ConvNorm(nn.Sequential):
    """A convolution ``conv`` without bias and its batch norm ``bn``, the names of Ultralytics' ``Conv``."""

    def __init__(self, channels: int, width: int, kernel_size: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width)))


class MapAttention2d(nn.Module):
    """YOLO's self-attention with keys narrower than values and a positional convolution of the values.

    ``proj(attention(qkv(x)) + pe(v))``; qkv, proj and pe are convolutions with batch norms, pe depthwise. With
    ``attn_ratio`` 0.5 and a kernel of 3 it is PSA's attention (YOLOv10, Wang et al., NeurIPS 2024; YOLO11, YOLO26).
    With 1, 7 and several areas it is the area attention of YOLO12 (Tian et al., NeurIPS 2025).

    Args:
        channels: C.
        heads: number of attention heads; their values have ``channels // heads`` channels.
        attn_ratio: channels of a head's keys, as a part of those of its values.
        areas: spans of the map within which positions attend to each other.
        kernel_size: of the positional convolution.

    Raises:
        ValueError: a non-positive argument, ``channels`` not divisible by ``heads``, keys without channels, an even
            ``kernel_size``.

    ``state_dict``: ``qkv.conv.weight`` ``[heads (2 K + D), C, 1, 1]``, ``qkv.bn.*``, and so for ``proj`` and ``pe``:
    that of ``Attention`` and ``AAttn`` in Ultralytics.
    """

    QKV = Layers({"qkv": container(ConvNorm, 2), "qkv.conv": POINTWISE})

    def __init__(
        self, channels: int, heads: int = 8, attn_ratio: float = 0.5, areas: int = 1, kernel_size: int = 3
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads), ("areas", areas)):
            check_positive(name, value)
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads={heads}, got {channels}")
        check_odd("kernel_size", kernel_size)
        self.channels, self.heads, self.areas = channels, heads, areas
        self.key_width = int(channels // heads * attn_ratio)
        if self.key_width < 1:
            raise ValueError(f"attn_ratio must leave a head's keys a channel of {channels // heads}, got {attn_ratio}")
        self.qkv = ConvNorm(channels, channels + 2 * heads * self.key_width)
        self.proj = ConvNorm(channels, channels)
        self.pe = ConvNorm(channels, channels, kernel_size, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Every position attends to all positions of its area: ``[N, C, H, W]`` -> ``[N, C, H, W]``.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape that does not fit.
        """
        self.check(x)
        qkv = self.qkv(x)
        return self.merge(x, qkv, map_attention(qkv, self.heads, self.key_width, self.areas))

    def check(self, x: Tensor) -> None:
        """Raises unless x is a map of C channels on the device of the weights."""
        check_feature_map(x)
        if has_plain_layers(self, x, self.QKV):
            check_feature_map(x, self.channels)
            width = self.channels + 2 * self.heads * self.key_width
            conv: Any = self.qkv.get_submodule("conv")
            check_weight("qkv.conv.weight", conv.weight, (width, self.channels), x)

    def merge(self, x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
        """Adds the positional convolution of the values to the attended ones, and projects the sum, in x's dtype."""
        # The sum has the memory format of its first term, that of x.
        y: Tensor = self.proj(self.pe(map_values(qkv, self.heads, self.key_width)) + out)
        return y.to(x.dtype)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """``{"received": [N, heads, H, W]}``: the mean weight of each position; over an area the weights sum to 1.

        Running statistics stay as they are.
        """
        self.check(x)
        qkv = look(self.qkv.get_submodule("bn"), self.qkv.get_submodule("conv")(x))
        return received(qkv, self.heads, self.key_width, self.areas)

    def extra_repr(self) -> str:
        return f"{self.channels}, heads={self.heads}, key_width={self.key_width}, areas={self.areas}"
