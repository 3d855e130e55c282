"""Global response normalization, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.grn import GRN
from ..reference.checks import check_positive_number
from ..reference.grn import check_grn
from .serve import serve

__all__ = ["FastGRN", "grn"]


def grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalization: ``x + weight * x * n + bias`` with ``n = |x|_c / (mean_c |x|_c + eps)``.

    The norm of each channel is over H and W, its mean over the channels.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last; also ``[N, C, L]`` and ``[N, C, D, H, W]``.
        weight, bias: ``[C]``.
        eps: positive; keeps the quotient finite.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format. Sums are kept in float32 (float64 for float64); weights may
        have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an ``eps`` that is not positive.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Woo et al., "ConvNeXt V2", CVPR 2023.
    """
    check_positive_number("eps", eps)
    return serve(GRN, (x, weight, bias), check=check_grn, options=(float(eps),))


class FastGRN(reference.GRN):
    """Fused `reference.GRN`, one op per direction: same constructor, same ``state_dict``, same result."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns what `reference.GRN` does; see `grn`."""
        return grn(x, self.weight, self.bias, self.eps)
