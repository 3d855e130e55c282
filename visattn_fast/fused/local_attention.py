"""Local attention, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.local_attention import LOCAL_ATTENTION
from ..reference.as_built import as_built
from ..reference.local_attention import check_local_attention
from .calls import call_layers
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
    + q2)`` per pixel. The hidden map of the spatial gate is never stored.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, b1: weight ``[R, C]`` (or, as a 1x1 convolution, ``[R, C, 1, 1]``) and bias ``[R]`` or None.
        w2, b2: weight ``[C, R]`` (or ``[C, R, 1, 1]``) and bias ``[C]`` or None.
        p1, q1: weight ``[S, C]`` (or ``[S, C, 1, 1]``) and bias ``[S]`` or None.
        p2, q2: weight ``[1, S]`` (or ``[1, S, 1, 1]``) and bias ``[1]`` or None.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation.
        RuntimeError: the backend asked for cannot serve this call.
    """
    tensors = (x, w1, b1, w2, b2, p1, q1, p2, q2)
    return serve(LOCAL_ATTENTION, tensors, check=check_local_attention, residual=residual, activation=activation)


class FastLocalAttention(reference.LocalAttention):
    """Fused `reference.LocalAttention`: same constructor, same ``state_dict``, same result.

    The whole module is one op per direction, which reads the parameters of the inner layers. Layers that are not as
    built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(local_attention(x) + residual)``; see `local_attention`."""
        if as_built(self, x, self.LAYERS):
            return local_attention(x, *self.weights(), residual=residual, activation=activation)
        return call_layers(super().forward, x, residual, activation)
