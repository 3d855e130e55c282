"""The modules and the sizes that tests, benchmarks and the report run over, and the bytes that each module moves."""

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

    Attributes:
        name: of its function in `functional`, or of a variant of it.
        fast, reference: its two classes.
        arguments: constructor arguments for C channels.
        forward_passes, backward_passes: bytes that the streaming kernels move, in multiples of the bytes of x, small
            tensors aside; each read and each write counts. Convolutions inside the module are PyTorch's, and not
            counted; 0 where all of the module is PyTorch's.
        epilogue: whether forward takes ``residual`` and ``activation``.
        supports: whether there is such a module for a map of shape ``[N, C, H, W]``.
        training: the mode that `pair` leaves its modules in.
        rereads: whether programs read again what others have read. Caches hold it: a launch counts a tensor once.
        has_torch_layers: whether PyTorch's convolutions or linear layers run inside over whole maps: they keep maps of
            their own for the backward pass, and their sums may depend on the number of threads.
        saved: what is kept for the backward pass beside x and parameters, in multiples of the bytes of x of 64 channels
            and 576 pixels.
        resident: whether there are Triton kernels that keep an image on the chip, too: they move one x less each way.
        ops: that its two directions are made of; without any, ``name_fwd`` and ``name_bwd``.
        shapes: that the report measures it at; without any, the catalogue's.
        partial_gradients: parameters whose gradient leaves out a part of what they do, as the original has it.
        inference: whether forward is all that is fused, and no gradient is asked for.
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

    def pair(self, channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, nn.Module]:
        """A fast and a reference module with equal parameters, drawn from ``seed``; the caller's generator is kept.

        Parameters and running statistics that start as zeros or ones are spread, so that nothing hides behind them.
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


def _evaluated(entry: Entry) -> Entry:
    """The same module in eval mode: its batch norms take their running statistics."""
    return replace(entry, name=f"{entry.name}_eval", training=False, supports=lambda shape: True)


# In training a batch norm over a handful of values magnifies rounding, so these want a few of them.
_COORD_ATT = Entry(
    "coord_att",
    modules.FastCoordAtt,
    reference.CoordAtt,
    lambda c: {"in_channels": c},
    3,
    4,
    supports=lambda shape: shape[0] * (shape[2] + shape[3]) >= 8,
    ops=("axis_mean", "line_gates_fwd", "axis_scale", "axis_scale_bwd", "line_gates_bwd", "axis_input_grad"),
)
_SK = Entry(
    "sk",
    modules.FastSK,
    reference.SK,
    lambda c: {"channels": c, "reduction": min(16, c)},
    5,
    8,
    epilogue=False,
    supports=lambda shape: min(shape[:2]) > 1 and shape[0] * shape[2] * shape[3] >= 8,
    has_torch_layers=True,
    ops=("branch_mean", "branch_sum", "branch_dot", "branch_grad"),
)
_NAM = Entry(
    "nam",
    modules.FastNAM,
    reference.NAM,
    lambda c: {"channels": c},
    3,
    5,
    supports=lambda shape: shape[0] * shape[2] * shape[3] >= 8,
    ops=("nam_fwd", "nam_bwd"),
    partial_gradients=("bn2.weight",),
)

# Its convolutions are PyTorch's, and so are the products of the perceptron. The second batch norm takes most of the
# gradient of the first one's weight out; where few channels are, all but rounding.
_GAM = Entry(
    "gam",
    modules.FastGAM,
    reference.GAM,
    lambda c: {"in_channels": c, "rate": min(4, c)},
    4,
    8,
    supports=lambda shape: shape[1] >= 16 and shape[0] * shape[2] * shape[3] >= 8,
    has_torch_layers=True,
    ops=("channel_mlp_fwd", "channel_mlp_bwd", "norm_gate_fwd", "norm_gate_bwd"),
)

# Swin-T's stages at 224 x 224, and a vision transformer's positions at 112 to 256.
SWIN = ((4, 96, 56, 56), (4, 192, 28, 28), (4, 384, 14, 14), (4, 768, 7, 7))
_POSITIONS = ((4, 384, 7, 7), (4, 384, 14, 14), (4, 384, 16, 16))

# Attention over all positions, whose weights grow with their square; few channels have two small heads. Queries, keys
# and values are three maps; backward has a pass for queries and one for keys and values.
_SELF_ATTENTION = Entry(
    "self_attention",
    modules.FastSelfAttention2d,
    reference.SelfAttention2d,
    lambda c: {"channels": c, **({"heads": c // 32} if c % 64 == 0 else {"heads": 2, "head_dim": -(-c // 2)})},
    4,
    13,
    epilogue=False,
    supports=lambda shape: shape[2] * shape[3] <= 400 and (shape[1] <= 256 or shape[1] % 64 == 0),
    rereads=True,
    has_torch_layers=True,
    ops=("attention_fwd", "attention_bwd"),
    shapes=_POSITIONS,
)


def _heads(channels: int) -> int:
    """Two or more, of 32 channels each as in Swin where they can be; one for an odd number of channels."""
    return max(channels // 32, 2) if channels % 32 == 0 else 2 - channels % 2


def _shuffle_groups(channels: int) -> int:
    """The largest of 8, 4, 2 and 1 that shuffle attention takes for an even number of channels."""
    return next(g for g in (8, 4, 2, 1) if channels % (2 * g) == 0 or g == 1)


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            "se", modules.FastSE, reference.SE, lambda c: {"channels": c, "reduction": min(16, c)}, 3, 4, resident=True
        ),
        Entry("eca", modules.FastECA, reference.ECA, lambda c: {"channels": c}, 3, 4, resident=True),
        Entry("scse", modules.FastscSE, reference.scSE, lambda c: {"channels": c, "reduction": min(16, c)}, 3, 4),
        Entry(
            "local_attention",
            modules.FastLocalAttention,
            reference.LocalAttention,
            lambda c: {"channels": c, "reduction": min(8, c)},
            3,
            4,  # 5 for more than 256 channels
        ),
        Entry("cbam", modules.FastCBAM, reference.CBAM, lambda c: {"channels": c, "reduction": min(8, c)}, 4, 5),
        _COORD_ATT,
        _evaluated(_COORD_ATT),
        _SK,
        _evaluated(_SK),
        _GAM,
        replace(_evaluated(_GAM), forward_passes=3, backward_passes=5),
        Entry("simam", modules.FastSimAM, reference.SimAM, lambda c: {}, 2, 3),
        Entry(
            "shuffle_attention",
            modules.FastShuffleAttention,
            reference.ShuffleAttention,
            lambda c: {"channels": c, "groups": _shuffle_groups(c)},
            2,
            3,
            supports=lambda shape: shape[1] % 2 == 0,
        ),
        _NAM,
        replace(_evaluated(_NAM), forward_passes=2, backward_passes=3),
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
        Entry(
            "soca",
            modules.FastSOCA,
            reference.SOCA,
            lambda c: {"channels": c, "reduction": min(8, c)},
            3,
            4,
            saved=0.12,  # the covariance
            ops=(
                "channel_mean",
                "channel_covariance",
                "soca_gate_fwd",
                "channel_scale_fwd",
                "channel_scale_bwd",
                "soca_gate_bwd",
                "channel_input_grad",
            ),
        ),
        Entry(
            "criss_cross",
            modules.FastCrissCross,
            reference.CrissCross,
            lambda c: {"channels": c, "reduction": min(8, c)},
            0,
            0,
            epilogue=False,
            supports=lambda shape: shape[1] > 1,  # the gradients of one channel's keys cancel
            saved=2.3,  # queries, keys, values and what comes of them
        ),
        Entry(
            "window_attention",
            modules.FastWindowAttention2d,
            reference.WindowAttention2d,
            lambda c: {"channels": c, "window": 7, "heads": _heads(c), "shift": 3},
            4,
            7,
            epilogue=False,
            has_torch_layers=True,
            shapes=SWIN,
        ),
        Entry(
            "split_attention",
            modules.FastS2MLPv2,
            reference.S2MLPv2,
            lambda c: {"channels": c},
            7,
            8,
            epilogue=False,
            has_torch_layers=True,
            ops=("shift_total", "shift_sum", "shift_dot", "shift_grad"),
        ),
        _SELF_ATTENTION,
    )
}


class NormedGate(nn.Module):
    """What a block with a gate of the channels' means ends in: a batch norm, ``x * sigmoid(conv(mean(x)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, z: Tensor) -> Tensor:
        return reference.gate_channels(self.norm(z), self.gate)


class FastNormedGate(NormedGate):
    """The same by `gate_normed_channels`."""

    def forward(self, z: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        norm = self.norm
        return gate_normed_channels(
            z, norm.weight, norm.bias, norm.running_mean, norm.running_var, self.gate,
            training=norm.training, momentum=0.1, eps=norm.eps, residual=residual, activation=activation,
        )  # fmt: skip


# What `accelerate` makes of parts of models where no gradient is wanted, and no module of the package is.
INFERENCE = {
    entry.name: entry
    for entry in (
        Entry(
            "normed_gate",
            FastNormedGate,
            NormedGate,
            lambda c: {"channels": c},
            3,
            0,
            training=False,
            ops=("channel_mean", "channel_affine"),
            inference=True,
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
