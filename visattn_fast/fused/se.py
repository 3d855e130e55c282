"""Squeeze-and-excitation, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.se import SE
from ..reference.as_built import as_built
from ..reference.batch_norm import Norm
from ..reference.checks import ACTIVATIONS, GATES, check_bottleneck, check_choice
from .gates import gate_channels
from .serve import serve

__all__ = ["FastSE", "se"]


_HIDDEN = ACTIVATIONS[1:]


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

    The mean is over H and W.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: squeeze: weight ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and bias ``[R]`` or None.
        w2, b2: excitation: weight ``[C, R]`` (or ``[C, R, 1, 1]``) and bias ``[C]`` or None.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.
        hidden_activation: ``"relu"`` or ``"silu"`` (EfficientNet).
        gate_activation: ``"sigmoid"`` or ``"hard_sigmoid"``, ``relu6(v + 3) / 6`` (MobileNetV3).
        norm: a batch norm in eval mode (a `Norm`) to apply to x first. On CPUs, without gradients, it is part of the
            op.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
    """
    hidden = 1 + check_choice("hidden_activation", hidden_activation, _HIDDEN)
    gate = check_choice("gate_activation", gate_activation, GATES)
    return serve(
        SE,
        (x, w1, b1, w2, b2),
        check=check_bottleneck,
        options=(hidden, gate),
        residual=residual,
        activation=activation,
        norm=norm,
    )


class FastSE(reference.SE):
    """Fused `reference.SE`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layers. Layers that are not as
    built are called, between fused passes over x (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(se(x) + residual)``; see `se`."""
        if as_built(self, x, self.LAYERS):
            return se(x, *self.weights(), residual=residual, activation=activation)
        return gate_channels(x, self.gate, residual=residual, activation=activation)
