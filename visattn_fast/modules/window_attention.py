"""Fused attention inside windows."""

from __future__ import annotations

from torch import Tensor

from .. import functional, ops, reference
from ..backends import reference_asked
from ..functional.linear import linear


class FastWindowAttention2d(reference.WindowAttention2d):
    """`reference.WindowAttention2d`, fused: same constructor, same ``state_dict``, same result.

    Its linear layers' products are PyTorch's, or oneDNN's (`functional.linear`); hooks on these layers do not run.
    Weights, where they are asked for, are plain PyTorch.
    """

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def _attend(self, qkv: Tensor) -> Tensor:
        return functional.window_attention(qkv, **self._arguments(qkv))

    def _tokens(self, x: Tensor) -> Tensor:
        return super()._tokens(x) if self.layout == "nhwc" or reference_asked() else ops.token_grid(x)

    def _map(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.layout == "nhwc" else ops.in_format_of(x, y.permute(0, 3, 1, 2))
