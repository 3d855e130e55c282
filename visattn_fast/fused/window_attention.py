"""Attention inside (shifted) windows, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..backends import reference_asked
from ..ops.token_grid import in_format_of, token_grid
from ..ops.window_attention import WINDOW_ATTENTION
from ..reference.as_built import as_built
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
    """``softmax(scale q k^T + B) v`` for each head inside every window of a map; B is a relative position bias.

    Tokens are read where they lie, and results are written where they belong: shift, partition, seam, padding and bias
    cost no copies, and only qkv is kept for the backward pass. Seam and padding are those of
    `reference.window_attention`.

    Args:
        qkv: queries, keys and values of every token without their bias, ``[N, H, W, 3C]``, any floating dtype; channels
            in the order (3, heads, d).
        bias: bias of queries, keys and values, ``[3C]``, added to every token as it is read, and the value of padding;
            None: zeros. The layer that makes qkv then needs no bias, and the bias gradient no pass of its own.
        table: the values of B, ``[(2 window_h - 1) (2 window_w - 1), heads]``, a row for each offset.
        heads: number of heads, d channels each.
        window: height and width, or one int for both.
        shift: along H and W, less than the window.
        scale: factor of the logits; None: ``d**-0.5``.
        pad_first: True: the map is padded, then shifted, as in torchvision. False: the other way round, as in timm.

    Returns:
        ``[N, H, W, C]``, dense, in qkv's dtype. Sums are kept in float32 (float64 for float64); bias and table may have
        another dtype than qkv.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, a shift that is not less than the window.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Liu et al., "Swin Transformer: Hierarchical vision transformer using shifted windows", ICCV 2021.
    """
    window, shift = check_window_attention(qkv, bias, table, heads, window, shift)
    scale = (qkv.shape[3] // 3 // heads) ** -0.5 if scale is None else float(scale)
    geometry = (heads, *window, *shift, scale, int(pad_first))
    return serve(WINDOW_ATTENTION, (qkv, bias, table), options=geometry)


class FastWindowAttention2d(reference.WindowAttention2d):
    """Fused `reference.WindowAttention2d`: same constructor, same ``state_dict``, same result.

    The attention is one op per direction. The products of the linear layers are PyTorch's or oneDNN's (see ``linear``).
    Layers that are not as built are called (docs/guide/tools.md). Attention weights, if asked for, are computed in
    plain PyTorch.
    """

    def forward(self, x: Tensor, need_weights: str = "none") -> Tensor | tuple[Tensor, Tensor]:
        """Returns what `reference.WindowAttention2d` does, with the same arguments."""
        if not as_built(self, x, self.LAYERS):
            return super().forward(x, need_weights)
        self._check(x, need_weights)
        grid = self._tokens(x)
        out = window_attention(
            linear(grid, self.qkv.weight),
            self.qkv.bias,
            self.relative_position_bias_table,
            self.heads,
            self.window,
            self._shift(grid),
            pad_first=self.pad_first,
        )
        y = self._map(linear(out, self.proj.weight, self.proj.bias), x).to(x.dtype)
        return y if need_weights == "none" else (y, self._look(grid, need_weights))

    def _tokens(self, x: Tensor) -> Tensor:
        return super()._tokens(x) if self.layout == "nhwc" or reference_asked() else token_grid(x)

    def _map(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.layout == "nhwc" else in_format_of(x, y.permute(0, 3, 1, 2))
