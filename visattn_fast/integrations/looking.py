"""The gates of other libraries' modules, by their usual names, for `attention_maps` and `watch_gates`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from .recipe import Look, own_class
from .traceless import buffers_kept


def layers_as_gates(**layers: str) -> Look:
    """Returns a function that runs the library's own forward and keeps the outputs of layers, which are its gates.

    Args:
        layers: gate -> qualified name of the layer whose output it is. A layer that runs several times gives several
            gates, in this order.
    """

    def look(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        inner, handles = dict(module.named_modules()), []
        for layer in dict.fromkeys(layers.values()):
            if layer in inner:
                kinds = iter([kind for kind, other in layers.items() if other == layer])
                keep = functools.partial(_keep, found, kinds)
                handles.append(inner[layer].register_forward_hook(keep))
        try:
            with buffers_kept(module):
                own_class(module).forward(module, x)
        finally:
            for handle in handles:
                handle.remove()
        return {kind: found[kind] for kind in layers if kind in found}

    return look


def _keep(found: dict[str, Tensor], kinds: Iterator[str], layer: nn.Module, args: Any, output: Tensor) -> None:
    """Keeps the output of a layer as the next of ``kinds``; gates of channels as ``[N, C, 1, 1]``."""
    kind = next(kinds, None)
    if kind is not None:
        found[kind] = output.reshape(output.shape[0], -1, 1, 1) if kind == "channel" else output


def window_weights(
    attention: Any, x: Tensor, window: tuple[int, int], shift: tuple[int, int], pad_first: bool
) -> dict[str, Tensor]:
    """Returns what `reference.WindowAttention2d.attention` does, of a library's window attention.

    Args:
        attention: the module with the layer ``qkv`` and the table of relative position bias.
        x: token grid ``[N, H, W, C]``.
        window, shift, pad_first: as in `reference.WindowAttention2d`.
    """
    with torch.device("meta"):  # its own parameters are not used
        twin = reference.WindowAttention2d(
            x.shape[3], window, attention.num_heads, shift, layout="nhwc", pad_first=pad_first
        )
    twin.qkv, twin.relative_position_bias_table = attention.qkv, attention.relative_position_bias_table
    return twin.attention(x)
