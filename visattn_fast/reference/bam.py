"""BAM, the bottleneck attention module, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .as_built import Layers, container, has_plain_layers, layer
from .batch_norm import look
from .checks import check_choice, check_feature_map, check_positive, check_weight, hidden_width
from .custom_gates import checked
from .parameter_access import child

__all__ = ["BAM", "bam"]

# The index is the code that the ops take.
COMBINE = ("product", "sum")


def bam(
    x: Tensor,
    channel: Callable[[Tensor], Tensor],
    spatial: Callable[[Tensor], Tensor],
    combine: str = "product",
) -> Tensor:
    """``x * (1 + sigmoid(channel(mean(x)) * spatial(x)))``, the mean over H and W; or with the sum of both branches.

    Args:
        x: ``[N, C, H, W]``.
        channel: ``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``, in differentiable PyTorch.
        spatial: ``[N, C, H, W]`` -> ``[N, 1, H, W]``, in differentiable PyTorch.
        combine: ``"product"``, as the authors' code has it, or ``"sum"``, as their paper has it.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: a shape that does not fit, an unknown ``combine``.
        TypeError: a dtype that is not floating.
    """
    check_feature_map(x)
    check_choice("combine", combine, COMBINE)
    of_channel, of_pixel = channel(x.mean((2, 3), keepdim=True)), spatial(x)
    if isinstance(x, Tensor):  # not in a trace of torch.fx
        checked(of_channel, (*x.shape[:2], 1, 1), "channel", x)
        checked(of_pixel, (x.shape[0], 1, *x.shape[2:]), "spatial", x)
    return x * joint_gate(of_channel, of_pixel, combine)


def joint_gate(channel: Tensor, spatial: Tensor, combine: str) -> Tensor:
    """``1 + sigmoid(channel * spatial)``, or with their sum, of branches that broadcast to a map."""
    return 1 + torch.sigmoid(channel * spatial if combine == "product" else channel + spatial)


def _look(layers: nn.Sequential, x: Tensor) -> Tensor:
    """``layers(x)``, without counting the batch or touching running statistics."""
    for inner in layers:
        x = look(inner, x)
    return x


class ChannelBranch(nn.Module):
    """BAM's channel branch: linear, batch norm, ReLU, linear, C -> R -> C."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_c = nn.Sequential()
        self.gate_c.add_module("flatten", nn.Flatten())
        self.gate_c.add_module("gate_c_fc_0", nn.Linear(channels, hidden))
        self.gate_c.add_module("gate_c_bn_1", nn.BatchNorm1d(hidden))
        self.gate_c.add_module("gate_c_relu_1", nn.ReLU())
        self.gate_c.add_module("gate_c_fc_final", nn.Linear(hidden, channels))

    def forward(self, mean: Tensor) -> Tensor:
        """``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``."""
        return self.gate_c(mean)[:, :, None, None]

    def look(self, mean: Tensor) -> Tensor:
        """As `forward`, without counting the batch or touching running statistics."""
        return _look(self.gate_c, mean)[:, :, None, None]


class SpatialBranch(nn.Module):
    """BAM's spatial branch: a 1x1 convolution C -> R, two dilated 3x3 ones, each with batch norm and ReLU; R -> 1."""

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.gate_s = nn.Sequential()
        self._add("reduce0", nn.Conv2d(channels, hidden, 1), hidden)
        for i in range(2):
            self._add(f"di_{i}", nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation), hidden)
        self.gate_s.add_module("gate_s_conv_final", nn.Conv2d(hidden, 1, 1))

    def _add(self, name: str, conv: nn.Conv2d, hidden: int) -> None:
        self.gate_s.add_module(f"gate_s_conv_{name}", conv)
        self.gate_s.add_module(f"gate_s_bn_{name}", nn.BatchNorm2d(hidden))
        self.gate_s.add_module(f"gate_s_relu_{name}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, 1, H, W]``."""
        return self.gate_s(x)

    def look(self, x: Tensor) -> Tensor:
        """As `forward`, without counting the batch or touching running statistics."""
        return _look(self.gate_s, x)


class BAM(nn.Module):
    """Bottleneck attention module (Park et al., "BAM: Bottleneck Attention Module", BMVC 2018).

    ``y = x * (1 + sigmoid(M_c(mean(x)) * M_s(x)))``, the mean over H and W: M_c is linear, batch norm, ReLU, linear,
    C -> R -> C, and M_s a 1x1 convolution C -> R, two dilated 3x3 convolutions, each of the three with batch norm and
    ReLU, and a 1x1 convolution to one channel; R = C // reduction, all layers have biases. The authors' code multiplies
    the two branches, their paper adds them. ``[N, C, H, W]`` -> ``[N, C, H, W]``; in training N must be at least 2: the
    batch norm of the channel branch has one value of each unit per image.

    Args:
        channels: C.
        reduction: the hidden layers have ``channels // reduction`` units.
        dilation: of the 3x3 convolutions.
        combine: ``"product"``, as in the authors' code, or ``"sum"``, as in their paper.

    Raises:
        ValueError: a non-positive argument, fewer channels than ``reduction``, an unknown ``combine``.

    ``state_dict``: ``channel_att.gate_c.{gate_c_fc_0, gate_c_bn_1, gate_c_fc_final}.*`` and ``spatial_att.gate_s.
    {gate_s_conv_reduce0, gate_s_bn_reduce0, gate_s_conv_di_i, gate_s_bn_di_i, gate_s_conv_final}.*``, i in 0 and 1.
    """

    # Only checks read these layers. All layers are called.
    READ = Layers(
        {
            "channel_att": container(ChannelBranch, 1),
            "channel_att.gate_c": container(nn.Sequential, 5),
            "channel_att.gate_c.gate_c_fc_0": layer(nn.Linear),
            "channel_att.gate_c.gate_c_bn_1": layer(nn.BatchNorm1d),
        }
    )

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4, combine: str = "product") -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        check_positive("dilation", dilation)
        check_choice("combine", combine, COMBINE)
        self.channels, self.reduction, self.combine = channels, reduction, combine
        self.channel_att = ChannelBranch(channels, hidden)
        self.spatial_att = SpatialBranch(channels, hidden, dilation)

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the weights, before any batch norm counts a batch."""
        check_feature_map(x)
        if not has_plain_layers(self, x, self.READ):
            return
        check_feature_map(x, self.channels)
        _, fc, bn, *_ = child(self.channel_att, "gate_c")
        check_weight("channel_att.gate_c.gate_c_fc_0.weight", fc.weight, tuple(fc.weight.shape), x)
        if (bn.training or bn.running_mean is None) and x.shape[0] == 1:
            raise ValueError("the batch norm of pooled values needs at least 2 images in training, got 1")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return bam(x, self.channel_att, self.spatial_att, self.combine)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The factor of each element, between 1 and 2: ``{"element": [N, C, H, W]}``.

        Running statistics are left alone.
        """
        self.check(x)
        channel, spatial = self.channel_att.look(x.mean((2, 3), keepdim=True)), self.spatial_att.look(x)
        return {"element": joint_gate(channel, spatial, self.combine)}

    def extra_repr(self) -> str:
        return f"channels={self.channels}, reduction={self.reduction}, combine={self.combine!r}"
