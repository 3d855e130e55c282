"""Global response normalization in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_feature_map, check_floating, check_positive, check_positive_number, check_weight
from .positions import over_positions

__all__ = ["GRN", "grn"]


@over_positions
def grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """``x + weight * x * n + bias`` with ``n = |x|_c / (mean_c |x|_c + eps)``, the norm over H and W.

    Args:
        x: ``[N, C, H, W]``.
        weight, bias: ``[C]``.
        eps: positive; keeps the quotient finite.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an ``eps`` that is not positive.
        TypeError: a dtype that is not floating-point.
    """
    check_grn(x, weight, bias, eps)
    return torch.addcmul(bias[:, None, None], weight[:, None, None], x * response(x, eps)) + x


def response(x: Tensor, eps: float) -> Tensor:
    """The norm of each channel over H and W as a multiple of the mean over the channels, ``[N, C, 1, 1]``."""
    norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return norm / (norm.mean(1, keepdim=True) + eps)


def check_grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> None:
    """Raises unless the arguments of `grn` fit each other."""
    check_floating("weight", weight)
    check_feature_map(x, weight.shape[0] if weight.dim() == 1 else None)
    check_weight("weight", weight, (x.shape[1],), x)
    check_weight("bias", bias, (x.shape[1],), x)
    check_positive_number("eps", eps)


class GRN(nn.Module):
    """Global response normalization (Woo et al., "ConvNeXt V2", CVPR 2023).

    ``y = x + weight * x * n + bias`` with ``n = |x|_c / (mean_c |x|_c + eps)``: the norm of each channel over H and W,
    and its mean over the channels. ``[N, C, H, W]`` -> ``[N, C, H, W]``.

    Args:
        channels: C.
        eps: positive; keeps the quotient finite.

    Raises:
        ValueError: a non-positive argument.

    ``state_dict``: ``weight`` and ``bias``, ``[C]``, both zeros at first, as in timm's ``GlobalResponseNorm``.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive_number("eps", eps)
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the responses: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return grn(x, self.weight, self.bias, self.eps)

    @over_positions
    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The factor of each channel, ``{"channel": [N, C, 1, 1]}``: x times it, plus the bias, is the result."""
        check_grn(x, self.weight, self.bias, self.eps)
        return {"channel": 1 + self.weight[:, None, None] * response(x, self.eps)}

    def extra_repr(self) -> str:
        return f"channels={self.channels}, eps={self.eps}"
