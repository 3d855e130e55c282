"""Attention inside (shifted) windows, with a relative position bias, in plain PyTorch: Swin's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import check_choice, check_feature_map, check_floating, check_positive, check_weight

__all__ = ["WindowAttention2d", "window_attention"]

APART = -100.0  # added to the logits of two tokens that a cyclic shift has brought together, as Swin does
LAYOUTS = ("nchw", "nhwc")
WEIGHTS = ("none", "mean", "full")


@dataclass(frozen=True)
class Windows:
    """Where the tokens of a map ``[H, W]`` are in its windows.

    The map is padded at its end to whole windows and moved cyclically by the shift towards its start, in this order
    (``pad_first``, as Swin's detection code and torchvision) or in the other one (as timm).
    """

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int]
    pad_first: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Windows along H and W."""
        window_h, window_w = self.window  # not by -(-a // b): ONNX rounds quotients of integers towards zero
        return (self.height + window_h - 1) // window_h, (self.width + window_w - 1) // window_w

    def tokens(self, device: torch.device) -> Tensor:
        """The token ``h * W + w`` at each position, H * W at padding: ``[windows, L]``, int64."""
        h, w = (self._source(axis, device) for axis in (0, 1))
        there = (h < self.height)[:, None] & (w < self.width)
        return self._split(torch.where(there, h[:, None] * self.width + w, self.height * self.width))

    def positions(self, device: torch.device) -> Tensor:
        """The position ``window * L + place`` of each token: ``[H * W]``, int64."""
        (window_h, window_w), across = self.window, self.grid[1]
        h, w = (self._target(axis, device) for axis in (0, 1))
        h, w = h[:, None], w[None]
        window = (h // window_h) * across + w // window_w
        return ((window * window_h + h % window_h) * window_w + w % window_w).flatten()

    def apart(self, device: torch.device) -> Tensor:
        """Whether a query and a key are not neighbours on the map, ``[windows, L, L]``: a shift's seam lies between."""
        rows, columns = (
            torch.arange(count * size, device=device) >= count * size - shift
            for count, size, shift in zip(self.grid, self.window, self.shift, strict=True)
        )
        region = self._split(2 * rows[:, None].int() + columns.int())
        return region[:, :, None] != region[:, None]

    def _source(self, axis: int, device: torch.device) -> Tensor:
        """The row, or column, that is at each position; the size itself, or more, for padding."""
        size, padded, shift = (self.height, self.width)[axis], self._padded(axis), self.shift[axis]
        at = torch.arange(padded, device=device)
        if self.pad_first:
            return _modulo(at + shift, padded)
        return torch.where(at < size, _modulo(at + shift, size), size)

    def _target(self, axis: int, device: torch.device) -> Tensor:
        """The position of each row, or column."""
        size = (self.height, self.width)[axis]
        at = torch.arange(size, device=device) - self.shift[axis]
        return _modulo(at, self._padded(axis) if self.pad_first else size)

    def _padded(self, axis: int) -> int:
        return self.grid[axis] * self.window[axis]

    def _split(self, values: Tensor) -> Tensor:
        """``[padded H, padded W]`` -> ``[windows, L]``."""
        (down, across), (height, width) = self.grid, self.window
        return values.view(down, height, across, width).transpose(1, 2).reshape(down * across, height * width)


def _modulo(index: Tensor, size: int) -> Tensor:
    """``index % size``, by a tensor: ONNX has no remainder by a size that is known only where the program runs."""
    return torch.remainder(index, index.new_full((), size))


def relative_position(window: tuple[int, int], device: torch.device) -> Tensor:
    """The table's row for each query and key of a window, ``[L, L]``: by rows and columns from key to query."""
    h, w = (torch.arange(size, device=device) for size in window)
    along_h = h[:, None, None, None] - h[:, None] + window[0] - 1  # [query h, 1, key h, 1]
    along_w = w[:, None, None] - w + window[1] - 1  # [query w, 1, key w]
    size = window[0] * window[1]
    return (along_h * (2 * window[1] - 1) + along_w).reshape(size, size)


def window_weights(q: Tensor, k: Tensor, table: Tensor, windows: Windows, scale: float) -> Tensor:
    """The softmax in every window, ``[N, windows, heads, L, L]``, of q and k ``[N, windows, heads, L, d]``."""
    bias = table[relative_position(windows.window, table.device)].permute(2, 0, 1)
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    if any(windows.shift):
        logits = logits + APART * windows.apart(q.device)[:, None].to(logits.dtype)
    return torch.softmax(logits, -1)


def split_windows(qkv: Tensor, bias: Tensor | None, heads: int, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[N, windows, heads, L, d]`` of ``[N, H, W, 3C]``; padding is zeros, and the bias."""
    n, _, _, channels = qkv.shape
    tokens = torch.cat([qkv.flatten(1, 2), qkv.new_zeros(n, 1, channels)], 1)
    if bias is not None:
        tokens = tokens + bias.to(qkv.dtype)
    taken = tokens[:, windows.tokens(qkv.device)].unflatten(3, (3, heads, channels // 3 // heads))
    q, k, v = taken.permute(3, 0, 1, 4, 2, 5).unbind(0)
    return q, k, v


def join_windows(out: Tensor, windows: Windows) -> Tensor:
    """``[N, windows, heads, L, d]`` -> ``[N, H, W, C]``: the tokens where they were, padding dropped."""
    placed = out.transpose(2, 3).flatten(3).flatten(1, 2)
    return placed[:, windows.positions(out.device)].unflatten(1, (windows.height, windows.width))


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

    The map is padded to whole windows and shifted cyclically; B of a query and a key is the table's row of
    their distance. Where the shift has brought together what are no neighbours, 100 is taken off the logit, as Swin's
    published code, timm and torchvision do: not infinity, so that the result is theirs for logits of any size. Padding
    is attended to, as there.

    Args:
        qkv: queries, keys and values of every token, ``[N, H, W, 3C]``, less their bias; channels in the order (3,
            heads, d).
        bias: of queries, keys and values, ``[3C]``, added to every token, and all that padding has, since Swin pads
            before a linear layer makes queries, keys and values; None: zeros.
        table: ``[(2 window_h - 1) (2 window_w - 1), heads]``.
        heads: of d channels each.
        window: its height and width, or both in one.
        shift: along H and W, less than the window.
        scale: of the logits; None: ``d**-0.5``.
        pad_first: whether padding comes before the shift, as in torchvision, or after it, as in timm. It makes a
            difference where a map is shifted and no multiple of its window.

    Returns:
        ``[N, H, W, C]``.

    Raises:
        ValueError: shapes or devices that do not fit, a shift that is no part of the window.
        TypeError: a dtype that is not floating.
    """
    window, shift = check_window_attention(qkv, bias, table, heads, window, shift)
    windows = Windows(qkv.shape[1], qkv.shape[2], window, shift, pad_first)
    scale = (qkv.shape[3] // 3 // heads) ** -0.5 if scale is None else scale
    q, k, v = split_windows(qkv, bias, heads, windows)
    return join_windows(window_weights(q, k, table.to(q.dtype), windows, scale).to(v.dtype) @ v, windows)


def check_window_attention(
    qkv: Tensor, bias: Tensor | None, table: Tensor, heads: int, window: Any, shift: Any
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Window and shift as pairs. Raises unless the arguments of `window_attention` fit each other."""
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


def check_window(window: Any, shift: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both as pairs. Raises ValueError unless the window is positive, and the shift at least 0 and less than it."""
    window, shift = _pair("window", window), _pair("shift", shift)
    for size, step in zip(window, shift, strict=True):
        check_positive("window", size)
        if isinstance(step, torch.SymInt):  # made of the sizes of a map, by a module that was checked
            continue
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < size:
            raise ValueError(f"shift must be ints from 0 to less than the window, {window}, got {shift}")
    return window, shift


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one int or two, along H and W, got {value!r}")
    return value[0], value[1]


def _shift(step: int, size: int, window: int) -> int:
    """The step, or 0 where one window covers the axis."""
    if torch.compiler.is_exporting():  # without a branch: ONNX Runtime does not check for which sizes a program is
        return step * (1 - 1 // ((size + window - 1) // window))
    return step if size > window else 0


class WindowAttention2d(nn.Module):
    """Self-attention inside (shifted) windows of a map (Liu et al., "Swin Transformer", ICCV 2021).

    ``proj(window_attention(x @ qkv.weight.T, qkv.bias))``, see `window_attention`; qkv and proj are linear layers of
    each token's channels.
    Along an axis on which one window covers the map, nothing is shifted.

    Args:
        channels: C.
        window: its height and width, or both in one.
        heads: C must be a multiple.
        shift: along H and W, less than the window; half the window in every other block of a Swin transformer.
        qkv_bias: whether queries, keys and values have a bias.
        layout: of x and y: ``"nchw"``, feature maps, or ``"nhwc"``, token grids. Feature maps in channels_last are
            token grids already: they are not copied.
        pad_first: whether a map that is no multiple of its window is padded and then shifted, as in torchvision, or the
            other way round, as in timm.
        attn_drop: there for the original's sake; weights are not dropped.

    Raises:
        ValueError: arguments that do not fit, or an ``attn_drop`` other than 0.

    ``state_dict``, the one of timm's and torchvision's modules: ``qkv.weight`` ``[3C, C]``, ``qkv.bias``,
    ``proj.weight`` ``[C, C]``, ``proj.bias``, ``relative_position_bias_table`` ``[(2 window_h - 1) (2 window_w - 1),
    heads]``. The table of positions that torchvision's has as a buffer, ``relative_position_index``, is passed over.
    """

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
        """``[N, C, H, W]`` -> ``[N, C, H, W]``, or ``[N, H, W, C]`` -> ``[N, H, W, C]``, as ``layout`` says.

        Args:
            x: as above.
            need_weights: ``"none"``; ``"mean"``: also the mean weight that the queries of its window have for each
                token, ``[N, heads, H, W]``; ``"full"``: also all weights, ``[N, windows, heads, L, L]``, padding
                included.
        """
        self._check(x, need_weights)
        qkv = self._linear(self._tokens(x), self.qkv.weight)
        y = self._map(self._linear(self._attend(qkv), self.proj.weight, self.proj.bias), x).to(x.dtype)
        return y if need_weights == "none" else (y, self._weights(qkv, need_weights))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """``{"received": [N, heads, H, W]}``: the mean weight that the queries of its window have for each token."""
        self._check(x)
        return {"received": self._weights(self._linear(self._tokens(x), self.qkv.weight), "mean")}

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, weight, bias)

    def _attend(self, qkv: Tensor) -> Tensor:
        """``[N, H, W, 3C]`` -> ``[N, H, W, C]``."""
        return window_attention(qkv, **self._arguments(qkv))

    def _arguments(self, qkv: Tensor) -> dict[str, Any]:
        """Of `window_attention`, beside qkv."""
        axes = zip(self.shift, qkv.shape[1:3], self.window, strict=True)
        return {
            "bias": self.qkv.bias,
            "table": self.relative_position_bias_table,
            "heads": self.heads,
            "window": self.window,
            "shift": tuple(step and _shift(step, size, window) for step, size, window in axes),
            "pad_first": self.pad_first,
        }

    def _weights(self, qkv: Tensor, need: str) -> Tensor:
        arguments = self._arguments(qkv)
        windows = Windows(qkv.shape[1], qkv.shape[2], self.window, arguments["shift"], self.pad_first)
        q, k, _ = split_windows(qkv, arguments["bias"], self.heads, windows)
        scale = (self.channels // self.heads) ** -0.5
        weights = window_weights(q, k, arguments["table"].to(q.dtype), windows, scale)
        if need == "full":
            return weights
        there = (windows.tokens(qkv.device) < windows.height * windows.width).to(weights.dtype)  # not the padding's
        received = (there[:, None, None] @ weights).mT / there.sum(1)[:, None, None, None]  # [N, windows, heads, L, 1]
        return join_windows(received, windows).permute(0, 3, 1, 2)

    def _tokens(self, x: Tensor) -> Tensor:
        return x if self.layout == "nhwc" else x.permute(0, 2, 3, 1)

    def _map(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.layout == "nhwc" else y.permute(0, 3, 1, 2)

    def _check(self, x: Tensor, need_weights: str = "none") -> None:
        check_choice("need_weights", need_weights, WEIGHTS)
        if self.layout == "nchw":
            check_feature_map(x, self.channels)
        else:
            check_token_grid(x, self.channels)
        check_weight("qkv.weight", self.qkv.weight, (3 * self.channels, self.channels), x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, window={self.window}, heads={self.heads}, shift={self.shift}"


def check_token_grid(x: Tensor, channels: int) -> None:
    """Raises unless x is floating, ``[N, H, W, C]`` with H, W >= 1, and has ``channels`` channels."""
    check_floating("x", x)
    if x.dim() != 4 or x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] != channels:
        raise ValueError(f"x must have shape [N, H, W, {channels}] with at least one token, got {list(x.shape)}")
