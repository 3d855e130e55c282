"""Triplet attention in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import AFFINE_BATCH_NORM, SAME_SIZE_WITHOUT_BIAS, Layers, container, has_plain_layers
from .batch_norm import batch_norm_step, look, update_running_statistics
from .checks import check_feature_map, check_floating, check_odd, check_weight
from .parameter_access import child, parameter, weight_and_bias

__all__ = ["TripletAttention", "triplet_attention"]


class PlaneGate(NamedTuple):
    """The weights of one gate: a convolution of the two pooled maps of a plane to one, then a batch norm.

    Attributes:
        conv: ``[1, 2, k, k]`` with odd k; its first input is the maximum.
        norm_weight, norm_bias, running_mean, running_var: the batch norm's, ``[1]``.
        training: normalise with the batch's statistics, and update the running ones, if given, in place.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
    """

    conv: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = False
    momentum: float = 0.01
    eps: float = 1e-5

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors with gradients: ``(conv, norm_weight, norm_bias)``."""
        return self.conv, self.norm_weight, self.norm_bias

    @property
    def statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """The statistics to normalise with; None for the batch's own."""
        return (None, None) if self.training else (self.running_mean, self.running_var)

    def update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Moves the running statistics towards those of a batch of ``count`` values. The variance is the biased one."""
        update_running_statistics(self.running_mean, self.running_var, mean, var, count, self.momentum)


def triplet_attention(x: Tensor, cw: PlaneGate, hc: PlaneGate, hw: PlaneGate | None = None) -> Tensor:
    """``x * (gate_cw + gate_hc + gate_hw) / 3``, one gate for each pair of axes; without hw the mean of two gates.

    A gate is ``sigmoid(bn(conv([max, mean])))``; maximum and mean run over the third axis, and the convolution over the
    plane of the other two, zero-padded. The maximum sends its gradient to one element, the first of equal ones.

    Args:
        x: ``[N, C, H, W]``.
        cw: the gate of the planes ``[C, W]``, pooled over H.
        hc: the gate of the planes ``[H, C]``, pooled over W.
        hw: the gate of the planes ``[H, W]``, pooled over C; or None.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an even k, one value per batch norm in training, no running
            statistics outside of training.
        TypeError: a dtype that is not floating.
    """
    check_triplet_attention(x, cw, hc, hw)
    gates = [cw, hc] if hw is None else [cw, hc, hw]
    return x * mean_gate([_gate(g, plane) for g, plane in zip(gates, pooled_planes(x, hw is not None), strict=True)])


def _gate(g: PlaneGate, plane: Tensor) -> Tensor:
    z = F.conv2d(plane, g.conv, padding=g.conv.shape[3] // 2)
    if g.training and z.numel():
        batch_var, batch_mean = torch.var_mean(z.detach(), correction=0)
        g.update(batch_mean, batch_var, z.numel())
    mean, var = (t if t is None else t.to(g.norm_weight.dtype) for t in g.statistics)
    return torch.sigmoid(F.batch_norm(z, mean, var, g.norm_weight, g.norm_bias, g.training, 0.0, g.eps))


def pooled_planes(x: Tensor, spatial: bool) -> list[Tensor]:
    """Maximum and mean over H ``[N, 2, C, W]``, over W ``[N, 2, H, C]``, and if ``spatial`` over C ``[N, 2, H, W]``."""
    over_h, over_w, *over_c = (
        torch.stack([x.max(dim).values, x.mean(dim)], 1) for dim in ((2, 3, 1) if spatial else (2, 3))
    )
    return [over_h, over_w.mT, *over_c]


def mean_gate(gates: Sequence[Tensor]) -> Tensor:
    """The mean ``[N, C, H, W]`` of gates ``[N, 1, C, W]``, ``[N, 1, H, C]`` and, if there is one, ``[N, 1, H, W]``."""
    return functools.reduce(torch.add, broadcast_gates(gates).values()) / len(gates)


def broadcast_gates(gates: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gates as they multiply x: ``{"cw": [N, C, 1, W], "hc": [N, C, H, 1], "hw": [N, 1, H, W]}``."""
    cw, hc, *hw = gates
    return {"cw": cw.transpose(1, 2), "hc": hc.permute(0, 3, 2, 1), **({"hw": hw[0]} if hw else {})}


def check_triplet_attention(x: Tensor, cw: PlaneGate, hc: PlaneGate, hw: PlaneGate | None = None) -> None:
    """Raises unless the gates of `triplet_attention` fit x."""
    check_feature_map(x)
    n, c, h, w = x.shape
    for name, gate, plane in (("cw", cw, (c, w)), ("hc", hc, (h, c)), ("hw", hw, (h, w))):
        if gate is not None:
            check_plane_gate(name, gate, x, n * plane[0] * plane[1])


def check_plane_gate(name: str, g: PlaneGate, x: Tensor, values: int) -> None:
    """Raises unless the convolution of gate ``name`` has an odd k, and its batch norm fits it and ``values`` values."""
    check_floating(f"{name}.conv", g.conv)
    if g.conv.dim() != 4:
        raise ValueError(f"{name}.conv must have shape [1, 2, k, k], got {list(g.conv.shape)}")
    size = int(g.conv.shape[3])  # torch.jit.trace has tensors as sizes
    check_odd(f"the kernel size of {name}.conv", size)
    check_weight(f"{name}.conv", g.conv, (1, 2, size, size), x)
    for field in ("norm_weight", "norm_bias", "running_mean", "running_var"):
        vector = getattr(g, field)
        if vector is not None:
            check_weight(f"{name}.{field}", vector, (1,), x)
    if g.training and values == 1:
        raise ValueError(f"{name}: its batch norm needs more than 1 value in training, got x {tuple(x.shape)}")
    if not g.training and (g.running_mean is None or g.running_var is None):
        raise ValueError(f"{name}: running_mean and running_var must be given unless training")


class NormedConv(nn.Module):
    """A convolution of two maps to one, and its batch norm."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)

    def forward(self, plane: Tensor) -> Tensor:
        """``[N, 2, A, B]`` -> ``[N, 1, A, B]``."""
        return cast(Tensor, self.bn(self.conv(plane)))


class PlaneAttention(nn.Module):
    """One of triplet attention's gates: ``sigmoid(bn(conv([max, mean])))``."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = NormedConv(kernel_size)

    def gate(self, counts: bool) -> PlaneGate:
        """The gate of this forward pass. If it ``counts``, the batch norm notes the batch in training."""
        conv, bn = (child(child(self, "conv"), name) for name in ("conv", "bn"))
        training, momentum = batch_norm_step(bn) if counts else (bn.training or bn.running_mean is None, 0.0)
        weight, bias = weight_and_bias(bn)
        statistics = bn.running_mean, bn.running_var
        return PlaneGate(parameter(conv, "weight"), weight, bias, *statistics, training, momentum, bn.eps)

    def forward(self, plane: Tensor) -> Tensor:
        """Maximum and mean ``[N, 2, A, B]`` -> gate ``[N, 1, A, B]``."""
        return torch.sigmoid(self.conv(plane))

    def look(self, plane: Tensor) -> Tensor:
        """As `forward`, without counting the batch or touching running statistics."""
        return torch.sigmoid(look(self.conv.bn, self.conv.conv(plane)))


def _assumed(*names: str) -> Layers:
    return Layers(
        {
            key: expected
            for name in names
            for key, expected in {
                name: container(PlaneAttention, 1),
                f"{name}.conv": container(NormedConv, 2),
                f"{name}.conv.conv": SAME_SIZE_WITHOUT_BIAS,
                f"{name}.conv.bn": AFFINE_BATCH_NORM,
            }.items()
        }
    )


class TripletAttention(nn.Module):
    """Triplet attention (Misra et al., "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021).

    ``y = x * (gate_cw + gate_hc + gate_hw) / 3``: each gate is ``sigmoid(bn(conv([max, mean])))`` of one pair of axes,
    maximum and mean over the third. Convolutions are k x k, 2 -> 1, zero-padded, without bias; batch norms have eps
    1e-5 and momentum 0.01. The planes lie as in the authors' code: ``[C, W]``, ``[H, C]``, ``[H, W]``. The maximum
    sends its gradient to one element, the first of equal ones. ``[N, C, H, W]`` -> ``[N, C, H, W]``, for any C.

    Args:
        kernel_size: k, odd.
        spatial: False leaves the gate of H and W out: ``y = x * (gate_cw + gate_hc) / 2``.

    Raises:
        ValueError: an even or non-positive ``kernel_size``.

    ``state_dict``, for each of cw, hc and, if ``spatial``, hw: ``cw.conv.conv.weight`` ``[1, 2, k, k]``, and
    ``cw.conv.bn.*`` as in ``nn.BatchNorm2d(1)``.
    """

    PAIR, TRIPLET = _assumed("cw", "hc"), _assumed("cw", "hc", "hw")

    def __init__(self, kernel_size: int = 7, spatial: bool = True) -> None:
        super().__init__()
        check_odd("kernel_size", kernel_size)
        self.cw = PlaneAttention(kernel_size)
        self.hc = PlaneAttention(kernel_size)
        self.hw = PlaneAttention(kernel_size) if spatial else None

    def layers(self) -> list[PlaneAttention]:
        """The layers cw, hc and, if there is one, hw."""
        return [child(self, "cw"), child(self, "hc")] + ([] if self.hw is None else [self.hw])

    def check(self, x: Tensor) -> None:
        """Raises unless x is a feature map that the weights fit, before any batch norm counts a batch."""
        if has_plain_layers(self, x, self.assumed):
            check_triplet_attention(x, *(layer.gate(counts=False) for layer in self.layers()))
        else:
            check_feature_map(x)

    @property
    def assumed(self) -> Layers:
        """The assumptions of the fused forward about the layers."""
        return self.PAIR if self.hw is None else self.TRIPLET

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        planes = pooled_planes(x, self.hw is not None)
        return x * mean_gate([layer(plane) for layer, plane in zip(self.layers(), planes, strict=True)])

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gates of x: ``{"cw": [N, C, 1, W], "hc": [N, C, H, 1], "hw": [N, 1, H, W]}``, hw if there is one.

        Running statistics are left alone.
        """
        self.check(x)
        planes = pooled_planes(x, self.hw is not None)
        return broadcast_gates([layer.look(plane) for layer, plane in zip(self.layers(), planes, strict=True)])
