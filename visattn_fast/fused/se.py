"""Squeeze-and-excitation."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.se import SE
from ..reference.batch_norm import Norm
from ..reference.checks import ACTIVATIONS, GATES, check_bottleneck, check_choice
from .serve import serve

__all__ = ["FastSE", "se"]


def se(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    hidden_activation: str = "relu",
    gate_activation: str = "sigmoid",
    norm: Norm | None = None,
) -> Tensor:
    """Squeeze-and-excitation: ``act(x * sigmoid(w2 relu(w1 mean(x) + b1) + b2) + residual)``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: squeeze, ``[R, C]`` (or a 1x1 convolution's ``[R, C, 1, 1]``) and ``[R]`` or None.
        w2, b2: excitation, ``[C, R]`` (or ``[C, R, 1, 1]``) and ``[C]`` or None.
        residual: x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.
        hidden_activation: ``"relu"`` or ``"silu"`` (EfficientNet).
        gate_activation: ``"sigmoid"`` or ``"hard_sigmoid"``, ``relu6(v + 3) / 6`` (MobileNetV3).
        norm: a batch norm in eval mode, a `Norm`, that x goes through first. On CPUs, without gradients, it is part of
            the op.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format. Sums are kept in float32 (float64 for float64); weights may
        have another dtype than x.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    hidden = 1 + check_choice("hidden_activation", hidden_activation, ACTIVATIONS[1:])
    gate = check_choice("gate_activation", gate_activation, GATES)
    return serve(SE, (x, w1, b1, w2, b2), options=(hidden, gate), residual=residual, activation=activation, norm=norm)


class FastSE(reference.SE):
    """`reference.SE`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(se(x) + residual)``; see `se`."""
        return se(x, *self.weights(), residual=residual, activation=activation)
