"""Attention inside (shifted) windows with a relative position bias, as in Swin, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .as_built import LINEAR, Layers, has_plain_layers
from .checks import check_choice, check_feature_map, check_floating, check_positive, check_token_grid, check_weight
from .self_attention import NEED_WEIGHTS
from .window_geometry import Windows, check_window, effective_shift, relative_position

__all__ = ["WindowAttention2d", "window_attention"]

APART = -100.0  # added to the logit of two tokens on different sides of the shift's seam, as in Swin
LAYOUTS = ("nchw", "nhwc")


def window_weights(q: Tensor, k: Tensor, table: Tensor, windows: Windows, scale: float) -> Tensor:
    """The softmax in every window, ``[N, windows, heads, L, L]``, from q and k ``[N, windows, heads, L, d]``."""
    bias = table[relative_position(windows.window, table.device)].permute(2, 0, 1)
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    if any(windows.shift):
        logits = logits + APART * windows.apart(q.device)[:, None].to(logits.dtype)
    return torch.softmax(logits, -1)


def split_windows(qkv: Tensor, bias: Tensor | None, heads: int, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Splits ``[N, H, W, 3C]`` into q, k, v, ``[N, windows, heads, L, d]`` each. Padding holds the bias or zeros."""
    n, _, _, channels = qkv.shape
    tokens = torch.cat([qkv.flatten(1, 2), qkv.new_zeros((n, 1, channels))], 1)
    if bias is not None:
        tokens = tokens + bias.to(qkv.dtype)
    taken = tokens[:, windows.tokens(qkv.device)].unflatten(3, (3, heads, channels // 3 // heads))
    q, k, v = taken.permute(3, 0, 1, 4, 2, 5).unbind(0)
    return q, k, v


def join_windows(out: Tensor, windows: Windows) -> Tensor:
    """``[N, windows, heads, L, d]`` -> ``[N, H, W, C]``; undoes padding and shift."""
    return _placed(out.transpose(2, 3).flatten(3), windows)


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

    The map is padded to whole windows and shifted cyclically. B of a query and a key is the table's row for their
    offset. If the shift has joined two tokens that are no neighbours, their logit is lowered by 100, as in Swin's
    published code, timm and torchvision; not by infinity, so that results agree with theirs for logits of any size.
    As there, queries attend to padding.

    Args:
        qkv: queries, keys and values of every token without their bias, ``[N, H, W, 3C]``; channels in the order (3,
            heads, d).
        bias: bias of queries, keys and values, ``[3C]``, added to every token and to padding: Swin pads before the
            linear layer that makes queries, keys and values. None: zeros.
        table: ``[(2 window_h - 1) (2 window_w - 1), heads]``.
        heads: number of heads, d channels each.
        window: height and width, or one int for both.
        shift: along H and W, less than the window.
        scale: factor of the logits; None: ``d**-0.5``.
        pad_first: whether padding comes before the shift, as in torchvision, or after it, as in timm. The results
            differ if a shifted map is no multiple of its window.

    Returns:
        ``[N, H, W, C]``.

    Raises:
        ValueError: shapes or devices that do not fit, a shift that is negative or not less than the window.
        TypeError: a dtype that is not floating-point.
    """
    window, shift = check_window_attention(qkv, bias, table, heads, window, shift)
    windows = Windows(qkv.shape[1], qkv.shape[2], window, shift, pad_first)
    scale = (qkv.shape[3] // 3 // heads) ** -0.5 if scale is None else scale
    q, k, v = split_windows(qkv, bias, heads, windows)
    return join_windows(window_weights(q, k, table.to(q.dtype), windows, scale).to(v.dtype) @ v, windows)


def check_window_attention(
    qkv: Tensor, bias: Tensor | None, table: Tensor, heads: int, window: Any, shift: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns window and shift as pairs. Raises unless the arguments of `window_attention` fit each other."""
    check_floating("qkv", qkv)
    check_positive("heads", heads)
    window, shift = check_window(window, shift)
    if qkv.dim() != 4 or qkv.shape[1] == 0 or qkv.shape[2] == 0:
        raise ValueError(f"qkv must have shape [N, H, W, 3C] with at least one token, got {list(qkv.shape)}")
    if qkv.shape[3] == 0 or qkv.shape[3] % (3 * heads):
        raise ValueError(f"qkv must have a multiple of 3 * heads = {3 * heads} channels, got {list(qkv.shape)}")
    check_weight("table", table, ((2 * window[0] - 1) * (2 * window[1] - 1), heads), qkv)
    if bias is not None:
        check_weight("bias", bias, (qkv.shape[3],), qkv)
    return window, shift


def _placed(out: Tensor, windows: Windows) -> Tensor:
    """``[N, windows, L, C]`` -> ``[N, H, W, C]``; undoes padding and shift."""
    tokens = out.flatten(1, 2)[:, windows.positions(out.device)]
    placed: Tensor = tokens.unflatten(1, (windows.height, windows.width))
    return placed


def _received(weights: Tensor, windows: Windows, need_weights: str) -> Tensor:
    """The weights ``[N, windows, heads, L, L]``, or their mean over each window's queries, ``[N, heads, H, W]``."""
    if need_weights == "full":
        return weights
    # Queries that are padding do not count.
    there = (windows.tokens(weights.device) < windows.height * windows.width).to(weights.dtype)
    received = (there[:, None, None] @ weights).mT / there.sum(1)[:, None, None, None]  # [N, windows, heads, L, 1]
    return join_windows(received, windows).permute(0, 3, 1, 2)


class WindowAttention2d(nn.Module):
    """Self-attention inside (shifted) windows of a map (Liu et al., "Swin Transformer", ICCV 2021).

    ``proj(window_attention(x @ qkv.weight.T, qkv.bias))``, see `window_attention`; qkv and proj are linear layers of
    each token's channels. Nothing is shifted along an axis that one window covers.

    Args:
        channels: C, a multiple of ``heads``.
        window: height and width, or one int for both.
        heads: number of attention heads.
        shift: along H and W, less than the window; half the window in every other block of a Swin transformer.
        qkv_bias: whether queries, keys and values have a bias.
        layout: layout of x and y: ``"nchw"``, feature maps, or ``"nhwc"``, token grids. Feature maps in channels_last
            already lie in memory as token grids and are not copied.
        pad_first: whether a map that is no multiple of its window is padded and then shifted, as in torchvision, or
            shifted and then padded, as in timm.
        attn_drop: only 0; an argument because the original has it. No weights are dropped.

    Raises:
        ValueError: arguments that do not fit, or an ``attn_drop`` other than 0.

    ``state_dict``, with the keys of timm's and torchvision's modules: ``qkv.weight`` ``[3C, C]``, ``qkv.bias``,
    ``proj.weight`` ``[C, C]``, ``proj.bias``, ``relative_position_bias_table`` ``[(2 window_h - 1) (2 window_w - 1),
    heads]``. Loading skips torchvision's buffer ``relative_position_index``.
    """

    LAYERS = Layers({"qkv": LINEAR, "proj": LINEAR})

    def __init__(
        self,
        channels: int,
        window: int | tuple[int, int],
        heads: int,
        shift: int | tuple[int, int] = 0,
        qkv_bias: bool = True,
        layout: str = "nchw",
        pad_first: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("heads", heads)
        self.window, self.shift = check_window(window, shift)
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads={heads}, got {channels}")
        if attn_drop != 0.0:
            raise ValueError(f"attn_drop must be 0: no attention weights are dropped, got {attn_drop}")
        check_choice("layout", layout, LAYOUTS)
        self.channels, self.heads, self.layout, self.pad_first = channels, heads, layout, pad_first
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        rows = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, heads))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, need_weights: str = "none") -> Tensor | tuple[Tensor, Tensor]:
        """Attention inside windows: ``[N, C, H, W]`` -> ``[N, C, H, W]``, or ``[N, H, W, C]`` -> ``[N, H, W, C]``.

        Args:
            x: a map in the module's ``layout``.
            need_weights: ``"none"``; ``"mean"``: also the mean weight of each token over the queries of its window,
                ``[N, heads, H, W]``; ``"full"``: also all weights, ``[N, windows, heads, L, L]``, padding included.
        """
        self._check(x, need_weights)
        grid = self._tokens(x)
        windows = self._windows(grid)
        q, k, v = self._projected(grid, windows)
        weights = self._weights(q, k, windows)
        out = self.proj((weights.to(v.dtype) @ v).transpose(2, 3).flatten(3))  # [N, windows, L, C]
        y = self._map(_placed(out, windows), x).to(x.dtype)
        return y if need_weights == "none" else (y, _received(weights, windows, need_weights))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """``{"received": [N, heads, H, W]}``: the mean weight of each token over the queries of its window."""
        self._check(x)
        return {"received": self._look(self._tokens(x), "mean")}

    def _look(self, grid: Tensor, need_weights: str) -> Tensor:
        """The weights of forward, from tokens ``[N, H, W, C]``."""
        windows = self._windows(grid)
        q, k, _ = self._projected(grid, windows)
        return _received(self._weights(q, k, windows), windows, need_weights)

    def _windows(self, grid: Tensor) -> Windows:
        return Windows(grid.shape[1], grid.shape[2], self.window, self._shift(grid), self.pad_first)

    def _shift(self, grid: Tensor) -> tuple[int, int]:
        axes = zip(self.shift, grid.shape[1:3], self.window, strict=True)
        shift_h, shift_w = (step and effective_shift(step, size, window) for step, size, window in axes)
        return shift_h, shift_w

    def _projected(self, grid: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens ``[N, H, W, C]``, ``[N, windows, heads, L, d]`` each."""
        n, _, _, channels = grid.shape
        tokens = torch.cat([grid.flatten(1, 2), grid.new_zeros(n, 1, channels)], 1)  # the last one is padding
        qkv: Tensor = self.qkv(tokens[:, windows.tokens(grid.device)])
        q, k, v = qkv.unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        return q, k, v

    def _weights(self, q: Tensor, k: Tensor, windows: Windows) -> Tensor:
        scale = (self.channels // self.heads) ** -0.5
        return window_weights(q, k, self.relative_position_bias_table.to(q.dtype), windows, scale)

    def _tokens(self, x: Tensor) -> Tensor:
        return x if self.layout == "nhwc" else x.permute(0, 2, 3, 1)

    def _map(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.layout == "nhwc" else y.permute(0, 3, 1, 2)

    def _check(self, x: Tensor, need_weights: str = "none") -> None:
        check_choice("need_weights", need_weights, NEED_WEIGHTS)
        if self.layout == "nchw":
            check_feature_map(x, self.channels)
        else:
            check_token_grid(x, self.channels)
        if has_plain_layers(self, x, self.LAYERS):
            check_weight("qkv.weight", self.qkv.weight, (3 * self.channels, self.channels), x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, window={self.window}, heads={self.heads}, shift={self.shift}"
