"""Attention inside windows."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import reference_asked
from ..ops.token_grid import in_format_of, token_grid
from ..ops.window_attention import WINDOW_ATTENTION
from ..reference.window_attention import check_window_attention
from .linear import linear
from .serve import serve

__all__ = ["FastWindowAttention2d", "window_attention"]


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor,
    heads: int,
    window: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    pad_first: bool = True,
) -> Tensor:
    """``softmax(scale q k^T + B) v`` inside every window of a map, for each head: B from a table of positions.

    Windows are read where they lie and written where they belong: shift, partition, biases, seams and padding are
    addresses, and nothing but qkv is kept for the backward pass. Seams and padding are as in
    `reference.window_attention`.

    Args:
        qkv: queries, keys and values of every token less their bias, ``[N, H, W, 3C]``, any floating dtype; channels in
            the order (3, heads, d).
        bias: of queries, keys and values, ``[3C]``, added to every token as it is read, and all that padding has; None:
            zeros. So the layer that makes qkv needs none, and its gradient no pass of its own.
        table: of B, ``[(2 window_h - 1) (2 window_w - 1), heads]``.
        heads: of d channels each.
        window: its height and width, or both in one.
        shift: along H and W, less than the window.
        scale: of the logits; None: ``d**-0.5``.
        pad_first: whether a map is padded and then shifted, as in torchvision, or the other way round, as in timm.

    Returns:
        ``[N, H, W, C]``, dense, in qkv's dtype. Sums are kept in float32 (float64 for float64); bias and table may have
        another dtype than qkv.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: shapes or devices that do not fit, a shift that is no part of the window.
        RuntimeError: the backend asked for cannot serve.

    Source: Liu et al., "Swin Transformer: Hierarchical vision transformer using shifted windows", ICCV 2021.
    """
    window, shift = check_window_attention(qkv, bias, table, heads, window, shift)
    scale = (qkv.shape[3] // 3 // heads) ** -0.5 if scale is None else float(scale)
    geometry = (heads, *window, *shift, scale, int(pad_first))
    return serve(WINDOW_ATTENTION, (qkv, bias, table), options=geometry)


class FastWindowAttention2d(reference.WindowAttention2d):
    """`reference.WindowAttention2d`, fused: same constructor, same ``state_dict``, same result.

    Its linear layers' products are PyTorch's, or oneDNN's (`linear`); hooks on these layers do not run.
    Weights, where they are asked for, are plain PyTorch.
    """

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def _attend(self, qkv: Tensor) -> Tensor:
        return window_attention(qkv, **self._arguments(qkv))

    def _tokens(self, x: Tensor) -> Tensor:
        return super()._tokens(x) if self.layout == "nhwc" or reference_asked() else token_grid(x)

    def _map(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.layout == "nhwc" else in_format_of(x, y.permute(0, 3, 1, 2))
