"""S2-MLPv2's spatial shifts and split attention in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import LINEAR_WITH_BIAS, LINEAR_WITHOUT_BIAS, Layers, container, has_plain_layers
from .checks import check_feature_map, check_positive, check_weight

__all__ = ["S2MLPv2", "split_attention"]

BRANCHES = 3


def shift(u: Tensor, directions: tuple[tuple[int, bool], ...]) -> Tensor:
    """Moves each quarter of the channels by one pixel and repeats the border: ``[N, C, H, W]`` -> ``[N, C, H, W]``.

    Quarters have ``C // 4`` channels; the last one takes the rest.

    Args:
        directions: for each quarter, the dimension, 2 (H) or 3 (W), and whether it moves forwards.
    """
    quarter, channels = u.shape[1] // 4, u.shape[1]
    parts = u.split([quarter, quarter, quarter, channels - 3 * quarter], 1)
    moved = []
    for part, (dim, forwards) in zip(parts, directions, strict=True):
        size = part.shape[dim]
        pieces = (
            [part.narrow(dim, 0, 1), part.narrow(dim, 0, size - 1)]
            if forwards
            else [part.narrow(dim, 1, size - 1), part.narrow(dim, size - 1, 1)]
        )
        moved.append(torch.cat(pieces, dim))
    return torch.cat(moved, 1)


ALONG_H, ALONG_W = ((2, True), (2, False)), ((3, True), (3, False))


def shifted_branches(u: Tensor) -> list[Tensor]:
    """The thirds of u's channels, ``[N, C, H, W]`` each: shifted along H first, along W first, and not shifted."""
    first, second, third = u.chunk(BRANCHES, 1)
    return [shift(first, ALONG_H + ALONG_W), shift(second, ALONG_W + ALONG_H), third]


def split_gate(total: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """``softmax(w2 gelu(w1 total))`` over the branches: ``[N, C]`` -> ``[N, 3, C]``."""
    return torch.softmax(F.linear(F.gelu(F.linear(total, w1)), w2).unflatten(1, (BRANCHES, -1)), 1)


def split_attention(u: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Shifts the thirds of u's channels and adds them, weighted by gates that sum to one in each channel.

    ``sum_k gate_k b_k`` with ``gate = softmax(w2 gelu(w1 sum(b)))``, the sum over branches and pixels. Branch 1 moves
    by one pixel: the first half of its channels along H (a quarter each way), the other half along W. Branch 2 swaps H
    and W; branch 3 does not move. At the border a pixel keeps its own value.

    Args:
        u: the three branches, ``[N, 3C, H, W]``.
        w1, w2: ``[C, C]`` and ``[3C, C]``.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    check_split_attention(u, w1, w2)
    branches = shifted_branches(u)
    gate = split_gate(sum_pixels(branches), w1, w2)[:, :, :, None, None]
    return gate[:, 0] * branches[0] + gate[:, 1] * branches[1] + gate[:, 2] * branches[2]


def sum_pixels(branches: list[Tensor]) -> Tensor:
    """Sums over branches and pixels, ``[N, C]``."""
    return (branches[0] + branches[1] + branches[2]).sum((2, 3))


def check_split_attention(u: Tensor, w1: Tensor, w2: Tensor) -> None:
    """Raises unless u is a feature map with 3C channels and w1 ``[C, C]`` and w2 ``[3C, C]`` fit it."""
    check_feature_map(u)
    channels = u.shape[1] // BRANCHES
    if u.shape[1] % BRANCHES:
        raise ValueError(f"u must have three branches of equally many channels, got shape {tuple(u.shape)}")
    check_weight("w1", w1, (channels, channels), u)
    check_weight("w2", w2, (BRANCHES * channels, channels), u)


class SplitAttention(nn.Module):
    """The gates of `split_attention`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp1 = nn.Linear(channels, channels, bias=False)
        self.mlp2 = nn.Linear(channels, BRANCHES * channels, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """``[N, 3C, H, W]`` -> ``[N, C, H, W]``."""
        branches = shifted_branches(u)
        gate = self.gate(branches)
        return gate[:, 0] * branches[0] + gate[:, 1] * branches[1] + gate[:, 2] * branches[2]

    def gate(self, branches: list[Tensor]) -> Tensor:
        """The gates of the branches, ``[N, 3, C, 1, 1]``."""
        logits = self.mlp2(F.gelu(self.mlp1(sum_pixels(branches))))
        return torch.softmax(logits.unflatten(1, (BRANCHES, -1)), 1)[:, :, :, None, None]


class S2MLPv2(nn.Module):
    """Spatial-shift MLP with split attention (Yu et al., "S2-MLPv2", 2021).

    ``mlp2(split_attention(mlp1(x)))``; at each pixel mlp1 maps C to 3C channels and mlp2 C to C:
    ``[N, C, H, W]`` -> ``[N, C, H, W]``. Shifts do not write in place: the popular code copies overlapping slices of
    one tensor, and its results differ from run to run. C is free: the popular code's attention has 512 channels.

    Args:
        channels: C; each direction shifts a quarter, ``C // 4`` channels, and the last quarter takes the rest.

    Raises:
        ValueError: a non-positive ``channels``.

    ``state_dict``: ``mlp1.weight`` ``[3C, C]``, ``mlp1.bias``, ``mlp2.weight`` ``[C, C]``, ``mlp2.bias``,
    ``split_attention.mlp1.weight`` ``[C, C]``, ``split_attention.mlp2.weight`` ``[3C, C]``.
    """

    MLP1, MLP2 = Layers({"mlp1": LINEAR_WITH_BIAS}), Layers({"mlp2": LINEAR_WITH_BIAS})
    GATE = Layers(
        {
            "split_attention": container(SplitAttention, 2),
            "split_attention.mlp1": LINEAR_WITHOUT_BIAS,
            "split_attention.mlp2": LINEAR_WITHOUT_BIAS,
        }
    )

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive("channels", channels)
        self.channels = channels
        self.mlp1 = nn.Linear(channels, BRANCHES * channels)
        self.mlp2 = nn.Linear(channels, channels)
        self.split_attention = SplitAttention(channels)

    def _check(self, x: Tensor) -> None:
        check_feature_map(x)
        if has_plain_layers(self, x, self.MLP1):
            weight = self.mlp1.weight
            check_feature_map(x, weight.shape[1])
            check_weight("mlp1.weight", weight, tuple(weight.shape), x)

    def gate_weights(self) -> tuple[Any, Any]:
        """``(w1, w2)``, as `split_attention` takes them."""
        return self.split_attention.mlp1.weight, self.split_attention.mlp2.weight

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self._check(x)
        u = self.mlp1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = self.mlp2(self.split_attention(u).permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2).to(x.dtype)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gates of x: ``{"branch": [N, 3, C, 1, 1]}``."""
        self._check(x)
        u = self.mlp1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {"branch": self.split_attention.gate(shifted_branches(u))}

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
