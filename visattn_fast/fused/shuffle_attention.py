"""Shuffle attention."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.shuffle_attention import SHUFFLE_ATTENTION
from ..reference.checks import check_feature_map
from ..reference.shuffle_attention import check_shuffle_attention
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
    """Shuffle attention: ``act(shuffle([x0 * channel gate, x1 * spatial gate]) + residual)`` in each group of channels.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        cweight, cbias, sweight, sbias, gn_weight, gn_bias, eps: as in `reference.shuffle_attention`.
        residual, activation: as in `se`; channels in the order of the result.

    Returns, raises: as `se`.

    Source: Zhang and Yang, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks", ICASSP 2021.
    """
    weights = (cweight, cbias, sweight, sbias, gn_weight, gn_bias)
    check_shuffle_attention(x, weights, eps)
    options = (float(eps),)
    return serve(SHUFFLE_ATTENTION, (x, *weights), options=options, residual=residual, activation=activation)


class FastShuffleAttention(reference.ShuffleAttention):
    """`reference.ShuffleAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layer do not run: the fused op reads its parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(shuffle_attention(x) + residual)``; see `shuffle_attention`."""
        check_feature_map(x, self.channels)
        return shuffle_attention(x, *self.weights(), self.gn.eps, residual=residual, activation=activation)
