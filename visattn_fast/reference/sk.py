"""Selective kernels in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import (
    AFFINE_BATCH_NORM,
    POINTWISE_WITH_BIAS,
    POINTWISE_WITHOUT_BIAS,
    RELU,
    Layers,
    container,
    has_plain_layers,
)
from .batch_norm import batch_norm_step, look, update_running_statistics
from .checks import check_branches, check_feature_map, check_positive, check_weight
from .parameter_access import child, parameter, weight_and_bias

__all__ = ["SK", "sk"]

BRANCHES = 2


def sk(
    v1: Tensor,
    v2: Tensor,
    w: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Weighs two branches: ``gate_1 relu(v1) + gate_2 relu(v2)``; in each channel the gates sum to one.

    ``h = relu(batch_norm(w mean(relu(v1) + relu(v2))))``, the mean over H and W; ``gate = softmax([w1 h + b1, w2 h +
    b2])`` over the two branches.

    Args:
        v1, v2: the branches before their ReLU, ``[N, C, H, W]``.
        w: ``[d, C]`` (or, as a 1x1 convolution, ``[d, C, 1, 1]``).
        norm_weight, norm_bias, running_mean, running_var: parameters and statistics of the batch norm, ``[d]``.
        w1, b1, w2, b2: ``[C, d]`` (or ``[C, d, 1, 1]``) and ``[C]``.
        training: normalise with the batch's statistics and update the running ones in place.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, a batch of fewer than two images in training.
        TypeError: a dtype that is not floating-point.
    """
    check_branches(v1, v2, w, norm_weight, norm_bias, running_mean, running_var, w1, b1, w2, b2, training=training)
    u1, u2 = F.relu(v1), F.relu(v2)
    weights = w, norm_weight, norm_bias, running_mean, running_var, w1, b1, w2, b2
    gate = sk_gate((u1 + u2).mean((2, 3)), *weights, training=training, momentum=momentum, eps=eps)
    gate = gate[:, :, :, None, None]
    return gate[:, 0] * u1 + gate[:, 1] * u2


def sk_gate(
    mean: Tensor,
    w: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """The gates of `sk`, ``[N, 2, C]``, from the mean of the branches' sum, ``[N, C]``."""
    z = F.linear(mean, w.flatten(1))
    if training or running_mean is None or running_var is None:
        var, center = torch.var_mean(z.detach(), 0, correction=0)
        update_running_statistics(running_mean, running_var, center, var, len(z), momentum)
        normal = F.batch_norm(z, None, None, norm_weight, norm_bias, True, 0.0, eps)
    else:
        statistics = running_mean.to(norm_weight.dtype), running_var.to(norm_weight.dtype)
        normal = F.batch_norm(z, *statistics, norm_weight, norm_bias, False, 0.0, eps)
    hidden = F.relu(normal)
    logits = [F.linear(hidden, w1.flatten(1), b1), F.linear(hidden, w2.flatten(1), b2)]
    return torch.softmax(torch.stack(logits, 1), 1)


class SK(nn.Module):
    """Selective kernel unit (Li et al., "Selective Kernel Networks", CVPR 2019).

    Two branches, ``U1 = relu(BN(conv3x3(x)))`` and ``U2``, the same with dilation 2, are weighted by gates that sum to
    one in each channel: ``gate_1 * U1 + gate_2 * U2``, ``gate = softmax(fcs(fc(mean(U1 + U2))))``. The mean is over H
    and W; fc is a linear layer to d units with batch norm and ReLU. ``[N, C, H, W]`` -> ``[N, C, H, W]``. In training
    N must be at least 2: the batch norm gets one value per image for each of the d units.

    Args:
        channels: C.
        reduction: d is ``channels // reduction``, and at least ``min_width``.
        groups: groups of both convolutions; 32 in the paper's networks.
        min_width: the smallest d, the paper's L.

    Raises:
        ValueError: a non-positive argument, ``groups`` that do not divide ``channels``.

    ``state_dict``, for i in 0 and 1: ``convs.i.0.weight`` ``[C, C/groups, 3, 3]`` and the batch norm ``convs.i.1.*``;
    ``fc.0.weight`` ``[d, C, 1, 1]`` and the batch norm ``fc.1.*``; ``fcs.i.weight`` ``[C, d, 1, 1]``, ``fcs.i.bias``.
    """

    # The convolutions of the branches and their batch norms are called in any case.
    LAYERS = Layers(
        {
            "convs": container(nn.ModuleList, 2),
            "convs.0": container(nn.Sequential, 3),
            "convs.0.2": RELU,
            "convs.1": container(nn.Sequential, 3),
            "convs.1.2": RELU,
            "fc": container(nn.Sequential, 3),
            "fc.0": POINTWISE_WITHOUT_BIAS,
            "fc.1": AFFINE_BATCH_NORM,
            "fc.2": RELU,
            "fcs": container(nn.ModuleList, 2),
            "fcs.0": POINTWISE_WITH_BIAS,
            "fcs.1": POINTWISE_WITH_BIAS,
        }
    )

    def __init__(self, channels: int, reduction: int = 16, groups: int = 1, min_width: int = 32) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction), ("groups", groups)):
            check_positive(name, value)
        check_positive("min_width", min_width)
        if channels % groups:
            raise ValueError(f"channels must be a multiple of groups={groups}, got {channels}")
        self.channels, self.reduction = channels, reduction
        hidden = max(channels // reduction, min_width)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for dilation in range(1, BRANCHES + 1)
        )
        self.fc = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.fcs = nn.ModuleList(nn.Conv2d(hidden, channels, 1) for _ in range(BRANCHES))

    def branches(self, x: Tensor) -> list[Tensor]:
        """The two branches of x before their ReLU, ``[N, C, H, W]`` each."""
        self._check(x)
        return [norm(conv(x)) for conv, norm in self._layers()]

    def _layers(self) -> list[Any]:
        return [(conv, norm) for conv, norm, _ in cast(Any, self.convs)]

    def _check(self, x: Tensor) -> None:
        check_feature_map(x)
        if has_plain_layers(self, x, self.LAYERS):
            squeeze, norm, _ = cast(Any, self.fc)
            check_feature_map(x, squeeze.weight.shape[1])
            check_weight("fc.0.weight", squeeze.weight, tuple(squeeze.weight.shape), x)
            if (norm.training or norm.running_mean is None) and x.shape[0] < 2:
                raise ValueError(
                    f"the batch norm of pooled values needs at least 2 images in training, got {x.shape[0]}"
                )

    def weights(self) -> tuple[Any, ...]:
        """``(w, norm_weight, norm_bias, running_mean, running_var, w1, b1, w2, b2)``, as `sk` takes them."""
        squeeze, norm, _ = child(self, "fc")
        first, second = child(self, "fcs")
        statistics = norm.running_mean, norm.running_var
        w, branches = parameter(squeeze, "weight"), (*weight_and_bias(first), *weight_and_bias(second))
        return w, *weight_and_bias(norm), *statistics, *branches

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self._check(x)
        branches = [branch(x) for branch in self.convs]
        gate = self.gate(sum(branches[1:], branches[0]).mean((2, 3), keepdim=True), self.fc)
        return sum(gate[:, i + 1] * branch for i, branch in enumerate(branches[1:])) + gate[:, 0] * branches[0]

    def gate(self, mean: Tensor, squeeze: Callable[[Tensor], Tensor]) -> Tensor:
        """The gates from the mean of the branches' sum: ``[N, C, 1, 1]`` -> ``[N, 2, C, 1, 1]``."""
        hidden = squeeze(mean)
        return torch.softmax(torch.stack([expand(hidden) for expand in self.fcs], 1), 1)

    def norm_step(self) -> dict[str, Any]:
        """Counts the batch in training. Returns ``training``, ``momentum`` and ``eps`` as `sk` takes them."""
        _, norm, _ = cast(Any, self.fc)
        training, momentum = batch_norm_step(norm)
        return {"training": training, "momentum": momentum, "eps": norm.eps}

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gates of x: ``{"branch": [N, 2, C, 1, 1]}``."""
        self._check(x)

        def through(layers: Any, value: Tensor) -> Tensor:
            for inner in layers:
                value = look(inner, value)
            return value

        branches = [through(branch, x) for branch in self.convs]
        mean = sum(branches[1:], branches[0]).mean((2, 3), keepdim=True)
        return {"branch": self.gate(mean, lambda mean: through(self.fc, mean))}

    def extra_repr(self) -> str:
        return f"channels={self.channels}, reduction={self.reduction}"
