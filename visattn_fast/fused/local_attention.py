"""Local attention."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.local_attention import LOCAL_ATTENTION
from ..reference.local_attention import check_local_attention
from .serve import serve

__all__ = ["FastLocalAttention", "local_attention"]


def local_attention(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    p1: Tensor,
    q1: Tensor | None,
    p2: Tensor,
    q2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Local attention: ``act(x * channel * spatial + residual)``.

    ``channel = sigmoid(w2 relu(w1 mean(x) + b1) + b2)``, the mean over H and W; ``spatial = sigmoid(p2 relu(p1 x + q1)
    + q2)`` per pixel, whose hidden map is never stored.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1, w2, b2: as in `se`.
        p1, q1: ``[S, C]`` (or a 1x1 convolution's ``[S, C, 1, 1]``) and ``[S]`` or None.
        p2, q2: ``[1, S]`` (or ``[1, S, 1, 1]``) and ``[1]`` or None.
        residual, activation: as in `se`.

    Returns, raises: as `se`.
    """
    tensors = (x, w1, b1, w2, b2, p1, q1, p2, q2)
    check_local_attention(*tensors)
    return serve(LOCAL_ATTENTION, tensors, residual=residual, activation=activation)


class FastLocalAttention(reference.LocalAttention):
    """`reference.LocalAttention`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layers do not run: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(local_attention(x) + residual)``; see `local_attention`."""
        return local_attention(x, *self.weights(), residual=residual, activation=activation)
