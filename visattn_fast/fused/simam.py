"""SimAM, parameter-free attention."""

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
        e_lambda: what keeps the quotient finite, positive.
        residual, activation: as in `se`.

    Returns, raises: as `se`.

    Source: Yang et al., "SimAM: A Simple, Parameter-Free Attention Module", ICML 2021.
    """
    check_feature_map(x)
    check_positive_number("e_lambda", e_lambda)
    return serve(SIMAM, (x,), options=(float(e_lambda),), residual=residual, activation=activation)


class FastSimAM(reference.SimAM):
    """`reference.SimAM`, fused: same constructor, same result."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(simam(x) + residual)``; see `simam`."""
        return simam(x, self.e_lambda, residual=residual, activation=activation)
