"""Geometry of (shifted) windows: the positions of a map's tokens in its windows, and the offsets between tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_positive


@dataclass(frozen=True)
class Windows:
    """The windows of a map ``[H, W]`` and the positions of its tokens in them.

    The map is padded at its end to whole windows, and shifted cyclically towards its start. ``pad_first``: padding
    comes before the shift, as in Swin's detection code and torchvision; otherwise after it, as in timm.
    """

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int]
    pad_first: bool

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of windows along H and W."""
        window_h, window_w = self.window  # not by -(-a // b): ONNX rounds quotients of integers towards zero
        return (self.height + window_h - 1) // window_h, (self.width + window_w - 1) // window_w

    def tokens(self, device: torch.device) -> Tensor:
        """The token ``h * W + w`` at each position, H * W for padding: ``[windows, L]``, int64."""
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
        """True if the seam of the cyclic shift lies between a query and a key: ``[windows, L, L]``."""
        rows, columns = (
            torch.arange(count * size, device=device) >= count * size - shift
            for count, size, shift in zip(self.grid, self.window, self.shift, strict=True)
        )
        region = self._split(2 * rows[:, None].int() + columns.int())
        return region[:, :, None] != region[:, None]

    def _source(self, axis: int, device: torch.device) -> Tensor:
        """The row (or column) that each position shows; for padding, the map's size or more."""
        size, padded, shift = (self.height, self.width)[axis], self._padded(axis), self.shift[axis]
        at = torch.arange(padded, device=device)
        if self.pad_first:
            return _modulo(at + shift, padded)
        return torch.where(at < size, _modulo(at + shift, size), size)

    def _target(self, axis: int, device: torch.device) -> Tensor:
        """The position of each row (or column); the inverse of `_source`."""
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
    """``index % size`` with the size as a tensor: ONNX has no remainder by a size that only the run knows."""
    return torch.remainder(index, index.new_full((), size))


def relative_position(window: tuple[int, int], device: torch.device) -> Tensor:
    """The row of the bias table for each query and key of a window, ``[L, L]``, from their offsets along H and W."""
    h, w = (torch.arange(size, device=device) for size in window)
    along_h = h[:, None, None, None] - h[:, None] + window[0] - 1  # [query h, 1, key h, 1]
    along_w = w[:, None, None] - w + window[1] - 1  # [query w, 1, key w]
    size = window[0] * window[1]
    return (along_h * (2 * window[1] - 1) + along_w).reshape(size, size)


def effective_shift(step: int, size: int, window: int) -> int:
    """The shift along an axis: 0 if one window covers the axis, else ``step``."""
    if torch.compiler.is_exporting():  # without a branch: ONNX Runtime does not check for which sizes a program is
        return step * (1 - 1 // ((size + window - 1) // window))
    return step if size > window else 0


def check_window(window: Any, shift: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns window and shift as pairs. Raises ValueError unless the window is positive and 0 <= shift < window."""
    window, shift = _pair("window", window), _pair("shift", shift)
    for size, step in zip(window, shift, strict=True):
        check_positive("window", size)
        if isinstance(step, torch.SymInt):  # computed from a map's sizes by a module that has checked its shift
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
