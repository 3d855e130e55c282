"""Global attention mechanism in plain PyTorch: an MLP over each pixel's channels, then a gate of convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import AFFINE_BATCH_NORM, LINEAR, REPLICATE, Layers, has_plain_layers, why_not_layer
from .batch_norm import batch_norm_step, look
from .checks import (
    ACTIVATIONS,
    check_batch_norm,
    check_bottleneck,
    check_choice,
    check_feature_map,
    check_residual,
    check_same_map,
    check_weight,
    hidden_width,
)

__all__ = ["GAM", "channel_mlp", "norm_gate"]


def channel_mlp_factor(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """The factor that `channel_mlp` multiplies x by, ``[N, C, H, W]``."""
    check_bottleneck(x, w1, b1, w2, b2)
    hidden = F.relu(F.linear(x.permute(0, 2, 3, 1), w1.flatten(1), b1))
    return F.linear(hidden, w2.flatten(1), b2).permute(0, 3, 1, 2)


def channel_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """``x * (w2 relu(w1 x + b1) + b2)``, matrix products over each pixel's channels; no sigmoid.

    Args:
        x: ``[N, C, H, W]``.
        w1, b1: ``[R, C]`` and ``[R]`` or None.
        w2, b2: ``[C, R]`` and ``[C]`` or None.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    return x * channel_mlp_factor(x, w1, b1, w2, b2)


def check_norm_gate(
    x: Tensor,
    m: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Raises unless the arguments of `norm_gate` fit: m has x's shape, and the batch norm has its channels."""
    check_feature_map(x)
    check_same_map("m", m, x)
    check_batch_norm(m, weight, bias, running_mean, running_var, training, eps)


def norm_gate(
    x: Tensor,
    m: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``x * sigmoid(bn(m))``, a gate that is a batch norm of another map.

    Args:
        x, m: ``[N, C, H, W]``.
        weight, bias, running_mean, running_var, training, momentum, eps: arguments of `F.batch_norm`, for m.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, a single value per channel in training.
        TypeError: a dtype that is not floating-point.
    """
    check_norm_gate(x, m, weight, bias, running_mean, running_var, training, eps)
    return x * torch.sigmoid(F.batch_norm(m, running_mean, running_var, weight, bias, training, momentum, eps))


def _convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)`` with replicate padding.

    Under torch.compile it pads by concatenation. Inductor (torch 2.13) may choose channels_last for the convolutions,
    and then refuses the strides of replicate padding's gradient.
    """
    if not torch.compiler.is_compiling() or why_not_layer(conv, REPLICATE):
        y: Tensor = conv(x)
        return y
    for dim in (2, 3):
        sizes = [conv.kernel_size[dim - 2] // 2 if d == dim else -1 for d in range(4)]
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([first.expand(sizes), x, last.expand(sizes)], dim)
    return F.conv2d(x, conv.weight, conv.bias)


class GAM(nn.Module):
    """Global attention mechanism (GAM).

    ``x1 = x * linear2(relu(linear1(x)))``, linear layers over each pixel's channels, C -> C // rate -> C, without a
    sigmoid; ``y = x1 * sigmoid(norm2(conv2(relu(norm1(conv1(x1))))))``, 7x7 convolutions C -> C // rate -> C with
    replicate padding: ``[N, C, H, W]`` -> ``[N, C, H, W]``. Convolutions and linear layers have biases. Other
    implementations apply a sigmoid to the first factor and pad with zeros, or run the two parts in parallel.

    Source: Liu et al., "Global Attention Mechanism: Retain Information to Enhance Channel-Spatial Interactions", 2021.

    Args:
        in_channels: C.
        out_channels: None or C, since the second gate multiplies x1; an argument because the original has it.
        rate: the hidden layers have ``C // rate`` units.

    Raises:
        ValueError: a non-positive argument, fewer channels than ``rate``, ``out_channels`` other than ``in_channels``.

    ``state_dict``, R = C // rate: ``linear1.weight`` ``[R, C]``, ``linear2.weight`` ``[C, R]``, ``conv1.weight``
    ``[R, C, 7, 7]``, ``conv2.weight`` ``[C, R, 7, 7]`` and their biases; the batch norms ``norm1.*`` and ``norm2.*``.
    """

    CHANNEL = Layers({"linear1": LINEAR, "linear2": LINEAR})
    NORM = Layers({"norm2": AFFINE_BATCH_NORM})
    LAYERS = Layers(
        {
            "linear1": LINEAR,
            "linear2": LINEAR,
            "conv1": REPLICATE,
            "conv2": REPLICATE,
            "norm2": AFFINE_BATCH_NORM,
        }
    )

    def __init__(self, in_channels: int, out_channels: int | None = None, rate: int = 4) -> None:
        super().__init__()
        hidden = hidden_width(in_channels, rate, ("in_channels", "rate"))
        if out_channels not in (None, in_channels):
            raise ValueError(
                f"out_channels must be in_channels={in_channels} or None: the gates multiply x, got {out_channels!r}"
            )
        self.channels, self.rate = in_channels, rate
        self.linear1 = nn.Linear(in_channels, hidden)
        self.linear2 = nn.Linear(hidden, in_channels)
        self.conv1 = nn.Conv2d(in_channels, hidden, 7, padding=3, padding_mode="replicate")
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, in_channels, 7, padding=3, padding_mode="replicate")
        self.norm2 = nn.BatchNorm2d(in_channels)

    def channel_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(w1, b1, w2, b2)``, as `channel_mlp` takes them."""
        return self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias

    def convolved(self, x: Tensor) -> Tensor:
        """``conv2(relu(norm1(conv1(x))))``, ``[N, C, H, W]``, the input of the second batch norm."""
        return _convolution(self.conv2, F.relu(self.norm1(_convolution(self.conv1, x))))

    def norm_weights(self) -> tuple[Any, ...]:
        """The second batch norm's ``(weight, bias, running_mean, running_var)``, as `norm_gate` takes them."""
        return self.norm2.weight, self.norm2.bias, self.norm2.running_mean, self.norm2.running_var

    def norm_step(self) -> dict[str, Any]:
        """Counts the batch in training. Returns ``training``, ``momentum`` and ``eps`` as `norm_gate` takes them."""
        training, momentum = batch_norm_step(self.norm2)
        return {"training": training, "momentum": momentum, "eps": self.norm2.eps}

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        x = x * self.factor(x)
        return x * torch.sigmoid(self.norm2(self.convolved(x)))

    def factor(self, x: Tensor) -> Tensor:
        """``linear2(relu(linear1(x)))`` over each pixel's channels, ``[N, C, H, W]``."""
        factor: Tensor = self.linear2(F.relu(self.linear1(x.permute(0, 2, 3, 1))))
        return factor.permute(0, 3, 1, 2)

    def check(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> None:
        """Raises unless x, residual and activation fit the module. Runs before any batch is counted."""
        check_feature_map(x)
        if has_plain_layers(self, x, self.LAYERS):
            check_bottleneck(x, *self.channel_weights())
            check_weight("conv1.weight", self.conv1.weight, tuple(self.conv1.weight.shape), x)
            bn = self.norm2
            batch = bn.training or bn.running_mean is None
            check_batch_norm(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, batch, bn.eps)
        if isinstance(x, Tensor):
            check_residual(residual, x)
            check_choice("activation", activation, ACTIVATIONS)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The two factors of x: ``{"factor": [N, C, H, W], "element": [N, C, H, W]}``, the first without a sigmoid.

        Running statistics stay as they are.
        """
        self.check(x)
        factor = self.factor(x)
        m = self.conv2(F.relu(look(self.norm1, self.conv1(x * factor))))
        return {"factor": factor, "element": torch.sigmoid(look(self.norm2, m))}

    def extra_repr(self) -> str:
        return f"in_channels={self.channels}, rate={self.rate}"
