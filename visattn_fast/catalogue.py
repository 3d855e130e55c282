"""The modules and the sizes that tests, benchmarks and the report run over, and the bytes that each module moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import modules, reference


@dataclass(frozen=True)
class Entry:
    """A module of the catalogue.

    Attributes:
        name: the name of its function in `functional`.
        fast, reference: its two classes.
        arguments: constructor arguments for C channels.
        forward_passes, backward_passes: bytes that the streaming kernels move, in multiples of the bytes of x, small
            tensors aside; each read and each write counts.
        epilogue: whether forward takes ``residual`` and ``activation``.
    """

    name: str
    fast: type[nn.Module]
    reference: type[nn.Module]
    arguments: Callable[[int], dict[str, Any]]
    forward_passes: int
    backward_passes: int
    epilogue: bool = True

    def pair(self, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """A fast and a reference module with equal parameters, drawn from ``seed``; the caller's generator is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fast = self.fast(**self.arguments(channels)).to(dtype)
        plain = self.reference(**self.arguments(channels)).to(dtype)
        plain.load_state_dict(fast.state_dict())
        return fast, plain


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("se", modules.FastSE, reference.SE, lambda c: {"channels": c, "reduction": min(16, c)}, 3, 4),
        Entry("eca", modules.FastECA, reference.ECA, lambda c: {"channels": c}, 3, 4),
        Entry("cbam", modules.FastCBAM, reference.CBAM, lambda c: {"channels": c, "reduction": min(8, c)}, 4, 5),
        Entry(
            "channel_attention",
            modules.FastChannelAttention,
            reference.ChannelAttention,
            lambda c: {"channels": c, "reduction": min(8, c)},
            1,
            1,
            epilogue=False,
        ),
        Entry(
            "spatial_attention",
            modules.FastSpatialAttention,
            reference.SpatialAttention,
            lambda c: {},
            1,
            1,
            epilogue=False,
        ),
    )
}

# ResNet-50's stages at 224 x 224 and a batch of one, as [N, C, H, W].
SHAPES = ((8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28), (1, 256, 56, 56))

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def feature_map(
    shape: tuple[int, ...],
    layout: str = "nchw",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """A normally distributed map, ``[N, C, H, W]``, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])
