"""BAM, the bottleneck attention module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import reference
from ..backends import decide
from ..ops.autograd import call_function, in_autocast
from ..ops.bam import BAM, Branches, JointScale
from ..reference.bam import COMBINE
from ..reference.checks import check_choice, check_feature_map
from ..reference.custom_gates import checked
from .calls import call_layers
from .gates import last_pass
from .serve import check_epilogue

__all__ = ["FastBAM", "bam"]


def bam(
    x: Tensor,
    channel: Callable[[Tensor], Tensor],
    spatial: Callable[[Tensor], Tensor],
    combine: str = "product",
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Bottleneck attention with any branches: ``act(x * (1 + sigmoid(channel(mean(x)) * spatial(x))) + residual)``.

    The mean is over H and W. The branches may contain layers of any kind; PyTorch runs and differentiates them. The
    passes over x around them are fused, and the gate ``[N, C, H, W]`` is never stored.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        channel: ``[N, C, 1, 1]`` in x's dtype -> ``[N, C, 1, 1]``. It is called once.
        spatial: x -> ``[N, 1, H, W]``. It is called once, and must not change x.
        combine: ``"product"`` of both, as in the authors' code, or ``"sum"``, as in their paper.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation or ``combine``, another shape returned by a
            branch.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Park et al., "BAM: Bottleneck Attention Module", BMVC 2018.
    """
    check_feature_map(x)
    added = check_choice("combine", combine, COMBINE)
    code = check_epilogue(x, residual, activation)
    if not decide(x, BAM).fused:
        return reference.epilogue(reference.bam(x, channel, spatial, combine).to(x.dtype), residual, activation)
    n, c, h, w = x.shape
    mean, again, *carriers = call_function(Branches, x, added)
    of_channel = checked(channel(mean.to(x.dtype)[:, :, None, None]), (n, c, 1, 1), "channel", x).flatten(1)
    of_pixel = checked(spatial(again), (n, 1, h, w), "spatial", x)[:, 0]
    tensors = (x, of_channel.to(mean.dtype), of_pixel.to(mean.dtype))
    return last_pass(JointScale, tensors, residual, carriers, code, added)


class FastBAM(reference.BAM):
    """`reference.BAM`, fused: same constructor, same ``state_dict``, same result.

    PyTorch runs its layers, with their hooks.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(bam(x) + residual)``; see `bam`."""
        self.check(x)
        if isinstance(x, Proxy):
            return call_layers(super().forward, x, residual, activation)
        weight = next(self.spatial_att.parameters(), x)
        dtype: torch.dtype = x.dtype if in_autocast(x) else weight.dtype  # autocast casts what layers read
        return bam(
            x,
            lambda mean: self.channel_att(mean.to(dtype)),
            lambda x: self.spatial_att(x.to(dtype)),
            self.combine,
            residual=residual,
            activation=activation,
        )
