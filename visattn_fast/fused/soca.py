"""Second-order channel attention."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.soca import SOCA
from ..reference.checks import check_bottleneck
from .serve import serve

__all__ = ["FastSOCA", "soca"]


def soca(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Second-order channel attention: ``act(x * sigmoid(w2 relu(w1 s + b1) + b2) + residual)``.

    s is the mean over rows of the square root of the channels' covariance; see `reference.SOCA`. Memory for it is
    ``[N, C, C]``; no copy of x is made.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1, w2, b2, residual, activation: as in `se`.

    Returns, raises: as `se`.

    Source: Dai et al., "Second-order attention network for single image super-resolution", CVPR 2019.
    """
    check_bottleneck(x, w1, b1, w2, b2)
    return serve(SOCA, (x, w1, b1, w2, b2), residual=residual, activation=activation)


class FastSOCA(reference.SOCA):
    """`reference.SOCA`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused ops read their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(soca(x) + residual)``; see `soca`."""
        return soca(x, *self.weights(), residual=residual, activation=activation)
