"""timm's Swin transformer blocks. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer
from torch import Tensor, nn

from .. import functional
from ..fused.linear import linear
from ..reference.as_built import LINEAR, Layers, container, layer
from .looking import window_weights
from .recipe import Recipe, Repeated
from .tiers import may_fuse

_NO_DROPOUT = layer(nn.Dropout, fits=lambda d: d["p"] == 0, words="set to zero")


class FastSwinTransformerBlock(swin_transformer.SwinTransformerBlock):
    """timm's SwinTransformerBlock, fused: no copy of the map rolls it or splits it into windows."""

    LAYERS = Layers(
        {
            "attn": container(swin_transformer.WindowAttention, 5),
            "attn.qkv": LINEAR,
            "attn.attn_drop": _NO_DROPOUT,
            "attn.proj": LINEAR,
            "attn.proj_drop": _NO_DROPOUT,
            "attn.softmax": layer(nn.Softmax),
        }
    )

    def _attn(self, x: Tensor) -> Tensor:
        block: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super()._attn(x)
        attn, sizes = block.attn, zip(block.window_size, x.shape[1:3], block.input_resolution, strict=True)
        if not block.dynamic_mask and any(-(-here // w) != -(-known // w) for w, here, known in sizes):
            return super()._attn(x)  # its mask is for another size
        out = functional.window_attention(
            linear(x, attn.qkv.weight), attn.qkv.bias, attn.relative_position_bias_table, attn.num_heads,
            block.window_size, block.shift_size, attn.scale, pad_first=False,
        )  # fmt: skip
        return linear(out, attn.proj.weight, attn.proj.bias)


RECIPES = [
    Recipe(
        swin_transformer.SwinTransformerBlock,
        FastSwinTransformerBlock,
        "window_attention",
        look=lambda block, x: window_weights(
            block.attn, block.norm1(x), block.window_size, block.shift_size, pad_first=False
        ),
        repeats=(
            Repeated(swin_transformer.SwinTransformerBlock, "1729d45df45bc8ea", "_attn"),
            Repeated(swin_transformer.SwinTransformerBlock, "ded0a17b976ee570", "get_attn_mask"),
            Repeated(swin_transformer.WindowAttention, "1c7c9afb1fe0a334"),
            Repeated(swin_transformer.WindowAttention, "6b52a07e951caa4a", "_get_rel_pos_bias"),
            Repeated(swin_transformer, "74e744e26434579a", "window_partition"),
            Repeated(swin_transformer, "7f975cab8adf7721", "window_reverse"),
            Repeated(swin_transformer, "781846c6819f24b3", "get_relative_position_index"),
        ),
    )
]
