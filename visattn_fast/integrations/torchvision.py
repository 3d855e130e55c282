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
from .recipe import Recipe, fingerprint
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


_KNOWN_ATTENTION = "63c3dbd3bd5ee1a1"  # hash of the code that the class above repeats; other versions are left alone


def _why_not_attention(module: Any) -> str:
    kind = swin_transformer.ShiftedWindowAttention
    sources = swin_transformer.shifted_window_attention, kind.forward, kind.define_relative_position_index
    found = fingerprint(*sources, kind.get_relative_position_bias, swin_transformer._get_relative_position_bias)
    return "" if found == _KNOWN_ATTENTION else "unknown version of window attention"


_look = layers_as_gates(channel="scale_activation")

RECIPES = [
    Recipe(SqueezeExcitation, FastSqueezeExcitation, "se", "gate_channels", why_no_units("fc1"), look=_look),
    Recipe(
        swin_transformer.ShiftedWindowAttention,
        FastShiftedWindowAttention,
        "window_attention",
        why_not=_why_not_attention,
        look=lambda module, x: window_weights(
            module, x, tuple(module.window_size), tuple(module.shift_size), pad_first=True
        ),
    ),
]
