"""SimAM in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_feature_map, check_positive_number
from .positions import over_positions

__all__ = ["SimAM", "simam"]


def simam_gate(x: Tensor, e_lambda: float = 1e-4) -> Tensor:
    """The gate that `simam` multiplies x by, ``[N, C, H, W]``."""
    check_feature_map(x)
    check_positive_number("e_lambda", e_lambda)
    d = x - x.mean((2, 3), keepdim=True)
    floor: Tensor | float = e_lambda
    if x.dtype == torch.float16:  # the square of d is to stay below its largest number, 65504
        unit = (d.detach().abs().amax((2, 3), keepdim=True) / 128).clamp(min=1)
        d, floor = d / unit, e_lambda / unit / unit
    mean = d.square().mean((2, 3), keepdim=True)  # in float16 the sum may be too large
    pixels = x.shape[2] * x.shape[3]
    variance = mean + mean / (pixels - 1) if pixels > 1 else mean
    return torch.sigmoid((d / (2 * (variance + floor).sqrt())).square() + 0.5)


@over_positions
def simam(x: Tensor, e_lambda: float = 1e-4) -> Tensor:
    """``x * sigmoid(d^2 / (4 (sum(d^2) / (HW - 1) + e_lambda)) + 0.5)`` with ``d = x - mean(x)``, over H and W.

    The variance of a 1x1 map is 0; the original divides by zero.

    Args:
        x: ``[N, C, H, W]``.
        e_lambda: positive; keeps the quotient finite.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: a shape that does not fit, an ``e_lambda`` that is not positive.
        TypeError: a dtype that is not floating-point.
    """
    return x * simam_gate(x, e_lambda)


class SimAM(nn.Module):
    """Parameter-free attention (Yang et al., "SimAM", ICML 2021).

    ``y = x * sigmoid(d^2 / (4 (sum(d^2) / (HW - 1) + e_lambda)) + 0.5)`` with ``d = x - mean(x)``, mean and sum over H
    and W: ``[N, C, H, W]`` -> ``[N, C, H, W]``. The variance of a 1x1 map is 0.

    Args:
        e_lambda: positive; keeps the quotient finite.

    Raises:
        ValueError: an ``e_lambda`` that is not positive.

    ``state_dict``: empty.
    """

    def __init__(self, e_lambda: float = 1e-4) -> None:
        super().__init__()
        check_positive_number("e_lambda", e_lambda)
        self.e_lambda = e_lambda

    @over_positions
    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return simam(x, self.e_lambda)

    @over_positions
    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of every element of x: ``{"element": [N, C, H, W]}``."""
        return {"element": simam_gate(x, self.e_lambda)}

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda}"
