"""BAM: launchers of the passes over x around its branches, whose results make one gate, 1 + sigmoid."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.joint_gate import apply_joint, joint_sums


def bam_scale(
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    added: bool,
) -> torch.Tensor:
    """Computes y = act(x * (1 + sigmoid(channel * spatial)) + residual), or with the branches' sum.

    x, residual [N, C, H, W], channel [N, C], spatial [N, H, W]. Moves 2 times the bytes of x.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return apply_joint(x, layout.sizes, layout, channel, spatial, added, more=residual, activation=activation)


def bam_scale_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    added: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes both branches' gradients from g' = grad * act'(x * gate + residual).

    Returns dchannel [N, C], dspatial [N, H, W], dresidual. Moves 2 times the bytes of x; with an activation g' is
    written, too, as dresidual (else empty: it is grad).
    """
    with device_guard(x):
        x, layout = canonical(x)
        return joint_sums(grad, x, layout, channel, spatial, residual, activation, added)


def bam_input_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    dmean: torch.Tensor | None,
    dbranch: torch.Tensor | None,
    added: bool,
) -> torch.Tensor:
    """Computes dx = grad * gate + dmean / HW + dbranch, in x's layout; dmean [N, C], dbranch like x.

    Moves 3 times the bytes of x, not x itself.
    """
    with device_guard(x):
        x, layout = canonical(x)
        strides = {"stride_n": layout.C * layout.HW, "stride_o": layout.C if layout.channels_last else layout.HW}
        sizes = layout.sizes._replace(**strides)
        return apply_joint(layout.dense(grad), sizes, layout, channel, spatial, added, dmean, dbranch)
