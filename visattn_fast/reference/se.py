"""Squeeze-and-excitation in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import LINEAR, RELU, SIGMOID, Layers, container, has_plain_layers
from .checks import ACTIVATIONS, GATES, check_bottleneck, check_choice, check_feature_map, hidden_width
from .parameter_access import child, weight_and_bias
from .positions import over_positions

__all__ = ["SE", "se"]


@over_positions
def se(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """``x * sigmoid(w2 relu(w1 mean(x) + b1) + b2)``, the mean over H and W.

    Args:
        x: ``[N, C, H, W]``.
        w1, b1: squeeze, ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: excitation, ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.
        hidden_activation: ``"relu"`` or ``"silu"`` (EfficientNet).
        gate_activation: ``"sigmoid"`` or ``"hard_sigmoid"``, ``relu6(v + 3) / 6`` (MobileNetV3).

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation.
        TypeError: a dtype that is not floating-point.
    """
    return x * se_gate(x, w1, b1, w2, b2, hidden_activation, gate_activation)


def se_gate(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """The gate that `se` multiplies x by, ``[N, C, 1, 1]``."""
    check_bottleneck(x, w1, b1, w2, b2)
    check_choice("hidden_activation", hidden_activation, ACTIVATIONS[1:])
    check_choice("gate_activation", gate_activation, GATES)
    squeezed = F.linear(x.mean((2, 3)), w1.flatten(1), b1)
    hidden = F.relu(squeezed) if hidden_activation == "relu" else F.silu(squeezed)
    excited = F.linear(hidden, w2.flatten(1), b2)
    # F.hardsigmoid has no second derivative.
    gate = torch.sigmoid(excited) if gate_activation == "sigmoid" else F.relu6(excited + 3) / 6
    return gate[:, :, None, None]


class SE(nn.Module):
    """Squeeze-and-excitation (Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018).

    ``y = x * sigmoid(W2 relu(W1 mean(x)))``: x and y ``[N, C, H, W]``, the mean over H and W.

    Args:
        channels: C.
        reduction: the hidden layer has ``channels // reduction`` units.
        bias: whether both linear layers have biases, as in the original (Caffe) and in torchvision's networks.

    Raises:
        ValueError: a non-positive argument, or fewer channels than ``reduction``.

    ``state_dict``: ``fc.0.weight`` ``[R, C]``, ``fc.2.weight`` ``[C, R]``; with ``bias`` also ``fc.0.bias`` and
    ``fc.2.bias``.
    """

    LAYERS = Layers({"fc": container(nn.Sequential, 4), "fc.0": LINEAR, "fc.1": RELU, "fc.2": LINEAR, "fc.3": SIGMOID})

    def __init__(self, channels: int, reduction: int = 16, bias: bool = False) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.channels, self.reduction = channels, reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, channels, bias=bias), nn.Sigmoid()
        )

    def weights(self) -> tuple[Any, ...]:
        """``(w1, b1, w2, b2)``, as `se` takes them."""
        layers = child(self, "fc")._modules
        return *weight_and_bias(layers["0"]), *weight_and_bias(layers["2"])

    @over_positions
    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return x * self.gate(x.mean((2, 3), keepdim=True))

    def gate(self, mean: Tensor) -> Tensor:
        """The gate from the means over H and W: ``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``."""
        gate: Tensor = self.fc(mean.flatten(1))
        return gate[:, :, None, None]

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the layers."""
        if has_plain_layers(self, x, self.LAYERS):
            check_bottleneck(x, *self.weights())
        else:
            check_feature_map(x)

    @over_positions
    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of x: ``{"channel": [N, C, 1, 1]}``."""
        self.check(x)
        return {"channel": self.gate(x.mean((2, 3), keepdim=True))}

    def extra_repr(self) -> str:
        return f"channels={self.channels}, reduction={self.reduction}"
