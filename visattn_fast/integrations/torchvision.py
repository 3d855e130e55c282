"""torchvision's squeeze-and-excitation and shifted window attention. Source: torchvision 0.28 (BSD-3-Clause)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models import swin_transformer
from torchvision.ops import SqueezeExcitation

from .. import functional
from ..fused.linear import linear
from ..reference.as_built import LINEAR, MEAN, Layers
from .looking import layers_as_gates, window_weights
from .pooled import pointwise
from .recipe import Recipe, Repeated
from .se_like import se_layers, se_like, why_no_units
from .tiers import gate_by_passes, may_fuse


class FastSqueezeExcitation(SqueezeExcitation):
    """torchvision's SqueezeExcitation, fused."""

    PARTS = Layers({"avgpool": MEAN})
    LAYERS = Layers({"avgpool": MEAN, **se_layers("fc1", "activation", "fc2", "scale_activation")})

    def channel_gate(self, mean: Tensor) -> Tensor:
        return self.scale_activation(pointwise(self.fc2, self.activation(pointwise(self.fc1, mean))))

    def forward(self, input: Tensor) -> Tensor:
        if may_fuse(self, input, self.LAYERS):
            return se_like(input, self.fc1, self.activation, self.fc2, self.scale_activation)
        return gate_by_passes(self, input, super().forward)


def _drops_nothing(d: Any) -> bool:
    return not (d["attention_dropout"] or d["dropout"])


class FastShiftedWindowAttention(swin_transformer.ShiftedWindowAttention):
    """torchvision's ShiftedWindowAttention, fused: no copy of the map rolls it or splits it into windows."""

    LAYERS = Layers(
        {"qkv": LINEAR, "proj": LINEAR},
        fits=_drops_nothing,
        words="attention_dropout or dropout: other values would be dropped",
    )

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if not may_fuse(self, x, self.LAYERS):
            return super().forward(x)
        (window_h, window_w), (shift_h, shift_w) = module.window_size, module.shift_size
        shift = (0 if x.shape[1] <= window_h else shift_h, 0 if x.shape[2] <= window_w else shift_w)
        out = functional.window_attention(
            linear(x, module.qkv.weight), module.qkv.bias, module.relative_position_bias_table, module.num_heads,
            (window_h, window_w), shift,
        )  # fmt: skip
        return linear(out, module.proj.weight, module.proj.bias)


_look = layers_as_gates(channel="scale_activation")

RECIPES = [
    Recipe(
        SqueezeExcitation,
        FastSqueezeExcitation,
        "se",
        "gate_channels",
        why_no_units("fc1"),
        look=_look,
        repeats=(
            Repeated(SqueezeExcitation, "1b28601f1a83eb27"),
            Repeated(SqueezeExcitation, "b90e45774e443ffb", "_scale"),
        ),
    ),
    Recipe(
        swin_transformer.ShiftedWindowAttention,
        FastShiftedWindowAttention,
        "window_attention",
        look=lambda module, x: window_weights(
            module, x, tuple(module.window_size), tuple(module.shift_size), pad_first=True
        ),
        repeats=(
            Repeated(swin_transformer.ShiftedWindowAttention, "7b138d7df367e406"),
            Repeated(swin_transformer.ShiftedWindowAttention, "6bb34b7aeb05551b", "define_relative_position_index"),
            Repeated(swin_transformer.ShiftedWindowAttention, "6951230c6fe16f25", "get_relative_position_bias"),
            Repeated(swin_transformer, "4358a511bee8bc47", "shifted_window_attention"),
            Repeated(swin_transformer, "768adb052915ac2b", "_get_relative_position_bias"),
        ),
    ),
]
