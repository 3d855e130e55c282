"""Ultralytics' attention over the positions of a map; its own convolutions run. Source: ultralytics 8.3 and later."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from ultralytics.nn.modules.block import AAttn, Attention

from .. import functional
from ..reference.as_built import Layers
from ..reference.map_attention import map_values, received
from .recipe import Recipe, Repeated
from .tiers import may_fuse
from .traceless import buffers_kept


def _attend(module: Any, x: Tensor, key_width: int, areas: int = 1, scale: float | None = None) -> Tensor:
    """Repeats the library's forward; its layers are called."""
    qkv = module.qkv(x)
    out = functional.map_attention(qkv, module.num_heads, key_width, areas, scale)
    y: Tensor = module.proj(module.pe(map_values(qkv, module.num_heads, key_width)) + out)
    return y


def _look(module: Any, x: Tensor, key_width: int, areas: int = 1) -> dict[str, Tensor]:
    with buffers_kept(module):
        return received(module.qkv(x), module.num_heads, key_width, areas)


class FastAttention(Attention):
    """The attention of Ultralytics' PSA blocks (YOLOv10, YOLO11, YOLO26) without its map of weights."""

    LAYERS = Layers({})

    def forward(self, x: Tensor) -> Tensor:
        if self.format == "coreml" or not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        return _attend(self, x, self.key_dim, scale=self.scale)


class FastAAttn(AAttn):
    """Ultralytics' area attention (YOLO12) without its map of weights."""

    LAYERS = Layers({})

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x, self.head_dim, self.area) if may_fuse(self, x, self.LAYERS) else super().forward(x)


RECIPES = [
    Recipe(
        Attention,
        FastAttention,
        "map_attention",
        look=lambda module, x: _look(module, x, module.key_dim),
        repeats=(Repeated(Attention, "0dfc8f40f16568ca"),),
    ),
    Recipe(
        AAttn,
        FastAAttn,
        "map_attention",
        look=lambda module, x: _look(module, x, module.head_dim, module.area),
        repeats=(Repeated(AAttn, "a954becb65e5083a"),),
    ),
]
