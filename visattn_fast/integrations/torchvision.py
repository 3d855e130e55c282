"""torchvision's squeeze-and-excitation and shifted window attention. Source: torchvision 0.28 (BSD-3-Clause)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import swin_transformer
from torchvision.ops import SqueezeExcitation

from .. import functional
from ..fused.linear import linear
from .pooled import pointwise
from .recipe import Recipe, all_of, fingerprint, layers
from .se_like import se_layers, se_like


class FastSqueezeExcitation(SqueezeExcitation):
    """torchvision's SqueezeExcitation, fused."""

    def forward(self, input: Tensor) -> Tensor:
        return se_like(input, self.fc1, self.activation, self.fc2, self.scale_activation)


class FastAnySqueezeExcitation(SqueezeExcitation):
    """The same with any activations, which run as they are."""

    def forward(self, input: Tensor) -> Tensor:
        def gate(mean: Tensor) -> Tensor:
            return self.scale_activation(pointwise(self.fc2, self.activation(pointwise(self.fc1, mean))))

        return functional.gate_channels(input, gate)


class FastShiftedWindowAttention(swin_transformer.ShiftedWindowAttention):
    """torchvision's ShiftedWindowAttention, whose windows are read where they lie."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        (window_h, window_w), (shift_h, shift_w) = module.window_size, module.shift_size
        shift = (0 if x.shape[1] <= window_h else shift_h, 0 if x.shape[2] <= window_w else shift_w)
        out = functional.window_attention(
            linear(x, module.qkv.weight), module.qkv.bias, module.relative_position_bias_table, module.num_heads,
            (window_h, window_w), shift,
        )  # fmt: skip
        return linear(out, module.proj.weight, module.proj.bias)


_KNOWN_ATTENTION = "63c3dbd3bd5ee1a1"  # what the class above repeats; another version's is left alone


def _against_attention(module: Any) -> str:
    if module.attention_dropout or module.dropout:
        return "attention_dropout or dropout: which values are dropped would change"
    kind = swin_transformer.ShiftedWindowAttention
    sources = swin_transformer.shifted_window_attention, kind.forward, kind.define_relative_position_index
    found = fingerprint(*sources, kind.get_relative_position_bias, swin_transformer._get_relative_position_bias)
    return "" if found == _KNOWN_ATTENTION else "this version's window attention is not the one that is known"


RECIPES = [
    Recipe(SqueezeExcitation, FastSqueezeExcitation, "se", se_layers("fc1", "activation", "fc2", "scale_activation")),
    Recipe(SqueezeExcitation, FastAnySqueezeExcitation, "gate_channels"),
    Recipe(
        swin_transformer.ShiftedWindowAttention,
        FastShiftedWindowAttention,
        "window_attention",
        all_of(layers({"qkv": (nn.Linear,), "proj": (nn.Linear,)}), _against_attention),
    ),
]
