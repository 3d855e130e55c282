"""Efficient channel attention, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.eca import ECA
from ..reference.as_built import as_built
from ..reference.batch_norm import Norm
from ..reference.checks import check_channel_kernel
from .gates import gate_channels
from .serve import serve

__all__ = ["FastECA", "eca"]


def eca(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Efficient channel attention: ``act(x * sigmoid(conv1d(mean(x))) + residual)``.

    The mean is over H and W; the convolution runs along C, with zero padding.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        weight: the convolution's, ``[1, 1, k]`` with odd k.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.
        norm: a batch norm in eval mode (a `Norm`) to apply to x first. On CPUs, without gradients, it is part of the
            op.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an even k, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Wang et al., "ECA-Net", CVPR 2020.
    """
    return serve(ECA, (x, weight), check=check_channel_kernel, residual=residual, activation=activation, norm=norm)


class FastECA(reference.ECA):
    """Fused `reference.ECA`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameter of the inner layer. If the layer is not as
    built, it is called, between fused passes over x (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(eca(x) + residual)``; see `eca`."""
        if as_built(self, x, self.LAYERS):
            return eca(x, *self.weights(), residual=residual, activation=activation)
        return gate_channels(x, self.gate, residual=residual, activation=activation)
