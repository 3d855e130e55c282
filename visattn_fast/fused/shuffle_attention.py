"""Shuffle attention, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.shuffle_attention import SHUFFLE_ATTENTION
from ..reference.as_built import as_built
from ..reference.checks import check_feature_map
from ..reference.shuffle_attention import check_shuffle_attention
from .calls import call_layers
from .serve import serve

__all__ = ["FastShuffleAttention", "shuffle_attention"]


def shuffle_attention(
    x: Tensor,
    cweight: Tensor,
    cbias: Tensor,
    sweight: Tensor,
    sbias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Shuffle attention: ``act(shuffle([x0 * channel gate, x1 * spatial gate]) + residual)``.

    x0 and x1 are the halves of each group of channels. The channel gate is ``sigmoid(cweight mean(x0) + cbias)``, the
    spatial gate ``sigmoid(sweight gn(x1) + sbias)``; mean and group norm (a group for each channel) are over H and W.
    The shuffle moves channel ``h C / 2 + j`` to channel ``2 j + h``.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        cweight, cbias, sweight, sbias, gn_weight, gn_bias: K elements each, shared by the ``G = C / 2K`` groups.
        eps: added to the group norm's variance.
        residual: added before the activation; x's shape, with channels in the order of the result, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Zhang and Yang, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks", ICASSP 2021.
    """
    weights = (cweight, cbias, sweight, sbias, gn_weight, gn_bias)
    check_shuffle_attention(x, weights, eps)
    options = (float(eps),)
    return serve(SHUFFLE_ATTENTION, (x, *weights), options=options, residual=residual, activation=activation)


class FastShuffleAttention(reference.ShuffleAttention):
    """Fused `reference.ShuffleAttention`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layer. If the layer is not as
    built, it is called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(shuffle_attention(x) + residual)``; see `shuffle_attention`."""
        if as_built(self, x, self.LAYERS):
            check_feature_map(x, self.channels)
            return shuffle_attention(x, *self.weights(), self.gn.eps, residual=residual, activation=activation)
        return call_layers(super().forward, x, residual, activation)
