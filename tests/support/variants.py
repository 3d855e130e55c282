"""Catalogue entries of gates that are no modules of the package: options, biases, and the caller's own mathematics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import visattn_fast as vf
from visattn_fast import catalogue, reference


class _SE(reference.SE):
    """`reference.SE` with biases and the given activations."""

    function = staticmethod(reference.se)

    def __init__(self, channels, hidden_activation, gate_activation):
        super().__init__(channels, reduction=4, bias=True)
        nn.init.normal_(self.fc[2].bias, std=3)  # puts some gates beyond the ends of the hard sigmoid
        self.names = {"hidden_activation": hidden_activation, "gate_activation": gate_activation}

    def forward(self, x):
        return self.function(x, *self.weights(), **self.names)


class _FastSE(_SE):
    function = staticmethod(vf.functional.se)


def se_with(hidden_activation: str, gate_activation: str) -> catalogue.Entry:
    """Returns the entry of squeeze-and-excitation with biases and the given activations."""
    options = {"hidden_activation": hidden_activation, "gate_activation": gate_activation}
    return catalogue.Entry("se", _FastSE, _SE, lambda c: {"channels": c, **options}, 3, 4)


def _biased(conv: nn.Conv2d, bias: float) -> None:
    conv.bias = nn.Parameter(torch.tensor([bias]))


class _CBAM(reference.CBAM):
    """`reference.CBAM` with a bias in its spatial gate."""

    def __init__(self, channels):
        super().__init__(channels, reduction=4, kernel_size=3)
        _biased(self.spatialattention.conv1, 0.7)


class _FastCBAM(vf.FastCBAM):
    def __init__(self, channels):
        super().__init__(channels, reduction=4, kernel_size=3)
        _biased(self.spatialattention.conv1, 0.7)


class _Spatial(reference.SpatialAttention):
    """`reference.SpatialAttention` with a bias."""

    def __init__(self, channels):
        super().__init__()
        _biased(self.conv1, -0.4)


class _FastSpatial(vf.FastSpatialAttention):
    def __init__(self, channels):
        super().__init__()
        _biased(self.conv1, -0.4)


# CBAM and its spatial gate with a bias of the convolution, as other libraries have it.
BIASED = {
    "cbam": catalogue.Entry("cbam", _FastCBAM, _CBAM, lambda c: {"channels": c}, 4, 5),
    "spatial_attention": catalogue.Entry(
        "spatial_attention", _FastSpatial, _Spatial, lambda c: {"channels": c}, 1, 1, epilogue=False
    ),
}


class _Twice(nn.Module):
    """A CBAM with biases, a batch norm, and SiLU instead of ReLU."""

    function: Any = staticmethod(reference.gate_twice)

    def __init__(self, channels: int, ties: str = "even", with_channel: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.SiLU(), nn.Conv2d(4, channels, 1))
        if not with_channel:
            del self.mlp
        self.conv, self.bn = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)
        self.ties, self.with_channel = ties, with_channel

    def forward(self, x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        def channel(mean, maximum):
            return (self.mlp(mean) + self.mlp(maximum)).sigmoid()

        def spatial(maps):
            return self.bn(self.conv(maps)).sigmoid()

        return self.function(x, channel if self.with_channel else None, spatial, ties=self.ties, **epilogue)


class _FastTwice(_Twice):
    function = staticmethod(vf.functional.gate_twice)


class _Channels(nn.Module):
    """Squeeze-and-excitation with GELU and tanh."""

    function: Any = staticmethod(reference.gate_channels)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GELU(), nn.Conv2d(4, channels, 1), nn.Tanh())

    def forward(self, x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        return self.function(x, self.mlp, **epilogue)


class _FastChannels(_Channels):
    function = staticmethod(vf.functional.gate_channels)


def _custom(fast: type[nn.Module], **arguments: Any) -> catalogue.Entry:
    return catalogue.Entry("gates", fast, fast.__bases__[0], lambda c: {"channels": c, **arguments}, 4, 5)


# Gates whose mathematics the caller brings. Ties of a maximum share its gradient evenly, or the first takes it.
CUSTOM = {
    "even": _custom(_FastTwice),
    "first": _custom(_FastTwice, ties="first"),
    "no channel gate": _custom(_FastTwice, with_channel=False),
    "channels": _custom(_FastChannels),
}
