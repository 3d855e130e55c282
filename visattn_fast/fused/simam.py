"""SimAM, parameter-free attention, fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.simam import SIMAM
from ..reference.checks import check_feature_map, check_positive_number
from .serve import serve

__all__ = ["FastSimAM", "simam"]


def simam(
    x: Tensor, e_lambda: float = 1e-4, *, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """SimAM: ``act(x * sigmoid(d^2 / (4 (sum(d^2) / (HW - 1) + e_lambda)) + 0.5) + residual)``, ``d = x - mean(x)``.

    Mean and sum are over H and W; the variance of a 1x1 map is 0.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        e_lambda: positive number that keeps the quotient finite.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: a shape or device that does not fit, an unknown activation, a non-positive ``e_lambda``.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Yang et al., "SimAM: A Simple, Parameter-Free Attention Module", ICML 2021.
    """
    check_positive_number("e_lambda", e_lambda)
    return serve(
        SIMAM, (x,), check=check_feature_map, options=(float(e_lambda),), residual=residual, activation=activation
    )


class FastSimAM(reference.SimAM):
    """Fused `reference.SimAM`, one op per direction: same constructor, same result."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(simam(x) + residual)``; see `simam`."""
        return simam(x, self.e_lambda, residual=residual, activation=activation)
