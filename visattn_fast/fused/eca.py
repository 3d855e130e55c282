"""Efficient channel attention."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.eca import ECA
from ..reference.batch_norm import Norm
from ..reference.checks import check_channel_kernel, check_feature_map
from .serve import serve

__all__ = ["FastECA", "eca"]


def eca(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Efficient channel attention: ``act(x * sigmoid(conv1d(mean(x))) + residual)``, the convolution along C.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        weight: ``[1, 1, k]`` with odd k; zero padding.
        residual, activation, norm: as in `se`.

    Returns, raises: as `se`.

    Source: Wang et al., "ECA-Net", CVPR 2020.
    """
    check_feature_map(x)
    check_channel_kernel(weight, x)
    return serve(ECA, (x, weight), residual=residual, activation=activation, norm=norm)


class FastECA(reference.ECA):
    """`reference.ECA`, fused: same constructor, same ``state_dict``, same result.

    Hooks on its inner layer do not run: the fused op reads its parameter alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(eca(x) + residual)``; see `eca`."""
        check_feature_map(x, self.channels)
        return eca(x, *self.weights(), residual=residual, activation=activation)
