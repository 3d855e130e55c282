"""timm's Swin transformer blocks. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer
from torch import Tensor, nn

from .. import functional
from ..fused.linear import linear
from .recipe import Recipe, all_of, fingerprint, require_layers


class FastSwinTransformerBlock(swin_transformer.SwinTransformerBlock):
    """timm's SwinTransformerBlock, fused: no copy of the map rolls it or splits it into windows."""

    def _attn(self, x: Tensor) -> Tensor:
        block: Any = self
        attn, sizes = block.attn, zip(block.window_size, x.shape[1:3], block.input_resolution, strict=True)
        if not block.dynamic_mask and any(-(-here // w) != -(-known // w) for w, here, known in sizes):
            return super()._attn(x)  # its mask is for another size
        out = functional.window_attention(
            linear(x, attn.qkv.weight), attn.qkv.bias, attn.relative_position_bias_table, attn.num_heads,
            block.window_size, block.shift_size, attn.scale, pad_first=False,
        )  # fmt: skip
        return linear(out, attn.proj.weight, attn.proj.bias)


_KNOWN = "d74a720dec74c492"  # hash of the code that the class above repeats; other versions are left alone


def _why_not_swin(block: Any) -> str:
    if block.attn.attn_drop.p or block.attn.proj_drop.p:
        return "attn_drop or proj_drop: other values would be dropped"
    swin, attention = swin_transformer, swin_transformer.WindowAttention
    found = fingerprint(
        swin.SwinTransformerBlock._attn, swin.SwinTransformerBlock.get_attn_mask, attention.forward,
        attention._get_rel_pos_bias, swin.window_partition, swin.window_reverse, swin.get_relative_position_index,
    )  # fmt: skip
    return "" if found == _KNOWN else "unknown version of window attention"


_LAYERS = require_layers(
    {"attn": (swin_transformer.WindowAttention,), "attn.qkv": (nn.Linear,), "attn.proj": (nn.Linear,)}
)

RECIPES = [
    Recipe(
        swin_transformer.SwinTransformerBlock,
        FastSwinTransformerBlock,
        "window_attention",
        all_of(_LAYERS, _why_not_swin),
    ),
]
