"""Efficient channel attention."""

from __future__ import annotations

from torch import Tensor

from .. import ops, reference
from ..reference.batch_norm import Norm
from ..reference.checks import check_channel_kernel, check_feature_map
from ._gated import gated


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
    return gated(reference.eca, ops.ECAFunction, (x, weight), residual, activation, norm=norm, normed=ops.eca_normed)
