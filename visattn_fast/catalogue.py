"""The modules and map sizes for tests, benchmarks and the report, and the bytes that each module moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import modules, reference
from .fused.normed import gate_normed_channels


@dataclass(frozen=True)
class Entry:
    """A module of the catalogue.

    Byte counts are declared only here: the report compares them with times, and `tools.traffic` with the kernels.

    Attributes:
        name: name of the function in `functional`, or of a variant of it.
        fast, reference: the fused class and the reference class.
        arguments: takes C, returns the constructor arguments for C channels.
        forward_passes, backward_passes: bytes that the streaming kernels read and write, in multiples of the bytes of
            x. Small tensors and PyTorch's convolutions inside the module do not count. 0: all of it is PyTorch's.
        epilogue: True if forward takes ``residual`` and ``activation``.
        supports: takes a shape ``[N, C, H, W]``, returns True if the module can be tested on such a map.
        training: the mode that `pair` leaves its modules in.
        rereads: True if programs read the same tensor again, from a cache; a launch then counts each tensor once.
        has_torch_layers: True if PyTorch's convolutions or linear layers run over whole maps inside. They keep maps of
            their own for the backward pass, and their sums may depend on the number of threads.
        saved: most bytes kept for the backward pass beside x and parameters, in multiples of the bytes of x, for 64
            channels and 576 pixels.
        resident: True if there are also Triton kernels that keep an image on the chip. They move one x less each way.
        ops: names of the ops that the two directions call; empty: ``name_fwd`` and ``name_bwd``.
        shapes: shapes that the report measures; empty: `SHAPES`.
        partial_gradients: parameters whose gradient, as in the original, leaves out part of their effect.
        inference: True if only forward is fused, for calls that want no gradient.
    """

    name: str
    fast: type[nn.Module]
    reference: type[nn.Module]
    arguments: Callable[[int], dict[str, Any]]
    forward_passes: float
    backward_passes: float
    epilogue: bool = True
    supports: Callable[[tuple[int, ...]], bool] = lambda shape: True
    training: bool = True
    rereads: bool = False
    has_torch_layers: bool = False
    saved: float = 0.08  # four values a pixel, or two a row and a column of a channel
    resident: bool = False
    ops: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int, int, int], ...] = ()
    partial_gradients: tuple[str, ...] = ()
    inference: bool = False

    @property
    def main(self) -> bool:
        """True unless the entry is the eval mode of a module that has another entry."""
        return not self.name.endswith("_eval")

    def pair(self, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """Makes a fast and a reference module with equal parameters, drawn from ``seed``.

        Parameters and running statistics that start as all zeros or ones are randomised, so that tests can see them.
        The caller's random generator is left alone.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fast = self.fast(**self.arguments(channels))
            for tensor in (*fast.parameters(), *(b for b in fast.buffers() if b.dtype.is_floating_point)):
                if (tensor == tensor.flatten()[0]).all():
                    tensor.data += 0.5 * torch.rand_like(tensor)
        plain = self.reference(**self.arguments(channels))
        plain.load_state_dict(fast.state_dict())
        return fast.to(dtype).train(self.training), plain.to(dtype).train(self.training)


def _both_modes(entry: Entry, **evaluated: Any) -> tuple[Entry, Entry]:
    """Returns an entry and its twin in eval mode, where batch norms take running statistics; ``evaluated`` differs."""
    twin = replace(entry, name=f"{entry.name}_eval", training=False, **{"supports": lambda shape: True, **evaluated})
    return entry, twin


def _pixels(shape: tuple[int, ...]) -> int:
    """The number of values per channel. A batch norm over a handful of them magnifies rounding in training."""
    return shape[0] * shape[2] * shape[3]


def _shuffle_groups(channels: int) -> int:
    """The largest of 8, 4, 2 and 1 groups that shuffle attention can split an even number of channels into."""
    return next(g for g in (8, 4, 2, 1) if channels % (2 * g) == 0 or g == 1)


def _window_heads(channels: int) -> int:
    """At least two heads, of 32 channels each as in Swin if possible; one head for an odd number of channels."""
    return max(channels // 32, 2) if channels % 32 == 0 else 2 - channels % 2


def _self_attention_heads(channels: int) -> dict[str, int]:
    """Heads of 32 channels if there are two or more, else two narrower ones."""
    return {"heads": channels // 32} if channels % 64 == 0 else {"heads": 2, "head_dim": -(-channels // 2)}


def _map_heads(channels: int) -> dict[str, float]:
    """Heads with values of 64 channels, as in YOLO, if possible; else two or one."""
    heads = channels // 64 if channels % 64 == 0 else 2 if channels > 2 and channels % 2 == 0 else 1
    return {"heads": heads, "attn_ratio": 0.5 if channels > heads else 1.0}


def _has_map_heads(shape: tuple[int, ...]) -> bool:
    """True if the Triton kernels serve heads so wide, and the reference's weights are not too many."""
    return shape[2] * shape[3] <= 400 and (shape[1] <= 128 or shape[1] % 64 == 0)


# YOLO11s at 640, 1280 and 2048 pixels.
_YOLO_MAPS = ((1, 128, 20, 20), (1, 128, 40, 40), (1, 128, 64, 64))
# Swin-T's stages at 224 x 224, and a vision transformer's maps at images of 112, 224 and 256 pixels.
_SWIN_STAGES = ((4, 96, 56, 56), (4, 192, 28, 28), (4, 384, 14, 14), (4, 768, 7, 7))
_VIT_MAPS = ((4, 384, 7, 7), (4, 384, 14, 14), (4, 384, 16, 16))

_ENTRIES = (
    Entry(
        "se",
        modules.FastSE,
        reference.SE,
        lambda c: {"channels": c, "reduction": min(16, c)},
        forward_passes=3,
        backward_passes=4,
        resident=True,
    ),
    Entry(
        "eca",
        modules.FastECA,
        reference.ECA,
        lambda c: {"channels": c},
        forward_passes=3,
        backward_passes=4,
        resident=True,
    ),
    Entry(
        "scse",
        modules.FastscSE,
        reference.scSE,
        lambda c: {"channels": c, "reduction": min(16, c)},
        forward_passes=3,
        backward_passes=4,
    ),
    Entry(
        "local_attention",
        modules.FastLocalAttention,
        reference.LocalAttention,
        lambda c: {"channels": c, "reduction": min(8, c)},
        forward_passes=3,
        backward_passes=4,  # 5 for more than 256 channels
    ),
    Entry(
        "cbam",
        modules.FastCBAM,
        reference.CBAM,
        lambda c: {"channels": c, "reduction": min(8, c)},
        forward_passes=4,
        backward_passes=5,
    ),
    Entry(
        "grn",
        modules.FastGRN,
        reference.GRN,
        lambda c: {"channels": c},
        forward_passes=3,
        backward_passes=5,
        epilogue=False,
    ),
    *_both_modes(
        Entry(
            "coord_att",
            modules.FastCoordAtt,
            reference.CoordAtt,
            lambda c: {"in_channels": c},
            forward_passes=3,
            backward_passes=4,
            # With one channel, the batch norm cancels the gradient of the weight before it.
            supports=lambda shape: shape[1] > 1 and shape[0] * (shape[2] + shape[3]) >= 8,
            ops=("axis_mean", "line_gates_fwd", "axis_scale", "axis_scale_bwd", "line_gates_bwd", "axis_input_grad"),
        )
    ),
    *_both_modes(
        Entry(
            "triplet_attention",
            modules.FastTripletAttention,
            reference.TripletAttention,
            lambda c: {},
            forward_passes=3,
            backward_passes=4,
            supports=lambda shape: shape[0] * min(shape[1] * min(shape[2:]), shape[2] * shape[3]) >= 8,
            saved=0.25,  # five values for each pair of indices
            ops=(
                "triplet_pool",
                "map_conv",
                "triplet_scale",
                "triplet_scale_bwd",
                "map_conv_bwd",
                "triplet_input_grad",
            ),
        )
    ),
    Entry(
        "bam",
        modules.FastBAM,
        reference.BAM,
        lambda c: {"channels": c, "reduction": min(16, c)},
        forward_passes=3,
        backward_passes=5,  # reads the gradient that the spatial branch has for x, too
        training=False,  # a chain of batch norms over a few values magnifies their rounding
        has_torch_layers=True,
        ops=("channel_mean", "bam_scale", "bam_scale_bwd", "bam_input_grad"),
    ),
    *_both_modes(
        Entry(
            "sk",
            modules.FastSK,
            reference.SK,
            lambda c: {"channels": c, "reduction": min(16, c)},
            forward_passes=5,
            backward_passes=8,
            epilogue=False,
            supports=lambda shape: min(shape[:2]) > 1 and _pixels(shape) >= 8,
            has_torch_layers=True,
            ops=("branch_mean", "branch_sum", "branch_dot", "branch_grad"),
        )
    ),
    *_both_modes(
        Entry(
            "gam",
            modules.FastGAM,
            reference.GAM,
            lambda c: {"in_channels": c, "rate": min(4, c)},
            forward_passes=4,
            backward_passes=8,
            # The second batch norm cancels most of the gradient of the first one's weight; with few channels only
            # rounding remains.
            supports=lambda shape: shape[1] >= 16 and _pixels(shape) >= 8,
            has_torch_layers=True,  # the convolutions, and the matrix products of the channel MLP
            ops=("channel_mlp_fwd", "channel_mlp_bwd", "norm_gate_fwd", "norm_gate_bwd"),
        ),
        forward_passes=3,
        backward_passes=5,
    ),
    Entry(
        "simam",
        modules.FastSimAM,
        reference.SimAM,
        lambda c: {},
        forward_passes=2,
        backward_passes=3,
    ),
    Entry(
        "shuffle_attention",
        modules.FastShuffleAttention,
        reference.ShuffleAttention,
        lambda c: {"channels": c, "groups": _shuffle_groups(c)},
        forward_passes=2,
        backward_passes=3,
        supports=lambda shape: shape[1] % 2 == 0,
    ),
    *_both_modes(
        Entry(
            "nam",
            modules.FastNAM,
            reference.NAM,
            lambda c: {"channels": c},
            forward_passes=3,
            backward_passes=5,
            supports=lambda shape: _pixels(shape) >= 8,
            ops=("nam_fwd", "nam_bwd"),
            partial_gradients=("bn2.weight",),
        ),
        forward_passes=2,
        backward_passes=3,
    ),
    Entry(
        "channel_attention",
        modules.FastChannelAttention,
        reference.ChannelAttention,
        lambda c: {"channels": c, "reduction": min(8, c)},
        forward_passes=1,
        backward_passes=1,
        epilogue=False,
    ),
    Entry(
        "spatial_attention",
        modules.FastSpatialAttention,
        reference.SpatialAttention,
        lambda c: {},
        forward_passes=1,
        backward_passes=1,
        epilogue=False,
    ),
    Entry(
        "soca",
        modules.FastSOCA,
        reference.SOCA,
        lambda c: {"channels": c, "reduction": min(8, c)},
        forward_passes=3,
        backward_passes=4,
        saved=0.12,  # the covariance
        ops=(
            "channel_mean",
            "channel_covariance",
            "soca_gate_fwd",
            "channel_scale_fwd",
            "channel_scale_bwd",
            "soca_gate_bwd",
            "channel_covariance_bwd",
            "channel_input_grad",
        ),
    ),
    Entry(
        "criss_cross",
        modules.FastCrissCross,
        reference.CrissCross,
        lambda c: {"channels": c, "reduction": min(8, c)},
        forward_passes=0,
        backward_passes=0,
        epilogue=False,
        supports=lambda shape: shape[1] > 1,  # the gradients of a single channel's keys cancel
        saved=2.3,  # queries, keys, values and the results of their products
    ),
    Entry(
        "window_attention",
        modules.FastWindowAttention2d,
        reference.WindowAttention2d,
        lambda c: {"channels": c, "window": 7, "heads": _window_heads(c), "shift": 3},
        forward_passes=4,
        backward_passes=7,
        epilogue=False,
        has_torch_layers=True,
        shapes=_SWIN_STAGES,
    ),
    Entry(
        "split_attention",
        modules.FastS2MLPv2,
        reference.S2MLPv2,
        lambda c: {"channels": c},
        forward_passes=7,
        backward_passes=8,
        epilogue=False,
        has_torch_layers=True,
        ops=("shift_total", "shift_sum", "shift_dot", "shift_grad"),
    ),
    Entry(
        "self_attention",
        modules.FastSelfAttention2d,
        reference.SelfAttention2d,
        lambda c: {"channels": c, **_self_attention_heads(c)},
        forward_passes=4,  # three maps of queries, keys and values, and the result
        backward_passes=13,  # a pass for queries, and one for keys and values
        epilogue=False,
        # The reference's weights grow with the square of the number of pixels.
        supports=lambda shape: shape[2] * shape[3] <= 400 and (shape[1] <= 256 or shape[1] % 64 == 0),
        rereads=True,
        has_torch_layers=True,
        ops=("attention_fwd", "attention_bwd"),
        shapes=_VIT_MAPS,
    ),
    *_both_modes(
        Entry(
            "map_attention",
            modules.FastMapAttention2d,
            reference.MapAttention2d,
            lambda c: {"channels": c, **_map_heads(c)},
            forward_passes=0,  # the ops of self-attention serve
            backward_passes=0,
            epilogue=False,
            supports=lambda shape: min(shape[:2]) > 1 and _pixels(shape) >= 8 and _has_map_heads(shape),
            has_torch_layers=True,
            ops=("map_attention_fwd", "map_attention_bwd"),
            shapes=_YOLO_MAPS,
        ),
        supports=_has_map_heads,
    ),
)
ENTRIES = {entry.name: entry for entry in _ENTRIES}


class NormedGate(nn.Module):
    """The end of a block with a channel gate: a batch norm, then ``x * sigmoid(conv(mean(x)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        """Normalises and gates: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return reference.gate_channels(self.norm(z), self.gate)


class FastNormedGate(NormedGate):
    """`NormedGate` by `gate_normed_channels`."""

    def forward(self, z: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Normalises and gates: ``[N, C, H, W]`` -> ``[N, C, H, W]``; adds ``residual`` and activates if asked."""
        norm = self.norm
        return gate_normed_channels(
            z,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            self.gate,
            training=norm.training,
            momentum=0.1,
            eps=norm.eps,
            residual=residual,
            activation=activation,
        )


# Parts of models that `accelerate` fuses for calls without gradients; the package has no module for them.
_INFERENCE = (
    Entry(
        "normed_gate",
        FastNormedGate,
        NormedGate,
        lambda c: {"channels": c},
        forward_passes=3,
        backward_passes=0,
        training=False,
        ops=("channel_mean", "channel_affine"),
        inference=True,
    ),
)
INFERENCE = {entry.name: entry for entry in _INFERENCE}

# ResNet-50's stages at 224 x 224, and one with a batch of one, as [N, C, H, W].
SHAPES = ((8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28), (1, 256, 56, 56))

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def feature_map(
    shape: tuple[int, ...],
    layout: str = "nchw",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """Draws a map ``[N, C, H, W]`` from a normal distribution, the same values on every device."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])
