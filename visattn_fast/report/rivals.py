"""Other libraries' modules with our parameters, on the same maps: rivals in the report and the benchmarks."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from .. import reference
from .cases import Shape


class _Tokens(nn.Module):
    """Runs a function of token grids ``[N, H, W, C]`` on maps ``[N, C, H, W]``; ``owner`` has its parameters."""

    def __init__(self, whole: nn.Module, owner: nn.Module, function: Any) -> None:
        super().__init__()
        self.whole, self.owner, self.function = whole, owner, function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def of_timm(plain: nn.Module, shape: Shape) -> _Tokens | None:
    """Builds timm's module with the parameters of ``plain``; None if timm has none like it, or is not installed.

    The ``.owner`` of the result holds the parameters, under the names that they have in ``plain``.
    """
    _, C, H, W = shape
    try:
        if isinstance(plain, reference.WindowAttention2d) and _same_in_timm(plain, H, W):
            swin = importlib.import_module("timm.models.swin_transformer")
            sizes = {"window_size": plain.window[0], "shift_size": plain.shift[0]}
            block = swin.SwinTransformerBlock(C, (H, W), plain.heads, **sizes)
            made = _Tokens(block, block.attn, block._attn)  # includes roll, partition and their inverses
        elif isinstance(plain, reference.SelfAttention2d):
            layers = importlib.import_module("timm.layers")
            attention = layers.Attention(C, plain.heads, qkv_bias=plain.qkv.bias is not None)
            made = _Tokens(attention, attention, lambda grid: attention(grid.flatten(1, 2)).view(grid.shape))
        else:
            return None
    except ImportError:
        return None
    made.owner.load_state_dict(plain.state_dict())
    parameter = next(plain.parameters())
    return made.to(parameter.device, parameter.dtype).train(plain.training)


def _same_in_timm(plain: reference.WindowAttention2d, H: int, W: int) -> bool:
    """True if windows are square and divide the map: timm pads in another way."""
    square = plain.window[0] == plain.window[1] and plain.shift[0] == plain.shift[1]
    return square and H % plain.window[0] == W % plain.window[1] == 0
