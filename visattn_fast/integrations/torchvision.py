"""torchvision's squeeze-and-excitation and shifted window attention. Source: torchvision 0.28 (BSD-3-Clause)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import swin_transformer
from torchvision.ops import SqueezeExcitation

from .. import functional
from ..fused.linear import linear
from .pooled import pointwise
from .recipe import Recipe, all_of, fingerprint, require_layers
from .se_like import se_layers, se_like


class FastSqueezeExcitation(SqueezeExcitation):
    """torchvision's SqueezeExcitation, fused."""

    def forward(self, input: Tensor) -> Tensor:
        return se_like(input, self.fc1, self.activation, self.fc2, self.scale_activation)


class FastAnySqueezeExcitation(SqueezeExcitation):
    """torchvision's SqueezeExcitation with any activations, which run as they are."""

    def forward(self, input: Tensor) -> Tensor:
        def gate(mean: Tensor) -> Tensor:
            return self.scale_activation(pointwise(self.fc2, self.activation(pointwise(self.fc1, mean))))

        return functional.gate_channels(input, gate)


class FastShiftedWindowAttention(swin_transformer.ShiftedWindowAttention):
    """torchvision's ShiftedWindowAttention, fused: no copy of the map rolls it or splits it into windows."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        (window_h, window_w), (shift_h, shift_w) = module.window_size, module.shift_size
        shift = (0 if x.shape[1] <= window_h else shift_h, 0 if x.shape[2] <= window_w else shift_w)
        out = functional.window_attention(
            linear(x, module.qkv.weight), module.qkv.bias, module.relative_position_bias_table, module.num_heads,
            (window_h, window_w), shift,
        )  # fmt: skip
        return linear(out, module.proj.weight, module.proj.bias)


_KNOWN_ATTENTION = "63c3dbd3bd5ee1a1"  # hash of the code that the class above repeats; other versions are left alone


def _why_not_attention(module: Any) -> str:
    if module.attention_dropout or module.dropout:
        return "attention_dropout or dropout: other values would be dropped"
    kind = swin_transformer.ShiftedWindowAttention
    sources = swin_transformer.shifted_window_attention, kind.forward, kind.define_relative_position_index
    found = fingerprint(*sources, kind.get_relative_position_bias, swin_transformer._get_relative_position_bias)
    return "" if found == _KNOWN_ATTENTION else "unknown version of window attention"


RECIPES = [
    Recipe(SqueezeExcitation, FastSqueezeExcitation, "se", se_layers("fc1", "activation", "fc2", "scale_activation")),
    Recipe(SqueezeExcitation, FastAnySqueezeExcitation, "gate_channels"),
    Recipe(
        swin_transformer.ShiftedWindowAttention,
        FastShiftedWindowAttention,
        "window_attention",
        all_of(require_layers({"qkv": (nn.Linear,), "proj": (nn.Linear,)}), _why_not_attention),
    ),
]
