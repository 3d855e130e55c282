"""S2-MLPv2's split attention."""

from __future__ import annotations

from torch import Tensor

from .. import ops, reference
from ..backends import fused
from ..reference.split_attention import check_split_attention
from ._gated import TINY


def split_attention(u: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Shifts the thirds of u's channels and adds them, weighed by gates that sum to one in each channel.

    ``sum_k gate_k b_k``, ``gate = softmax(w2 gelu(w1 sum(b)))``; the sum over branches and pixels. Branch 1 is shifted
    by one pixel along H in its first half of the channels (a quarter each way) and along W in the other, branch 2 the
    other way round, branch 3 not at all. At the border a pixel keeps its own value. Shifted maps are never stored.

    Args:
        u: the three branches, ``[N, 3C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, w2: ``[C, C]`` and ``[3C, C]``.

    Returns:
        ``[N, C, H, W]`` in u's dtype and memory format. Sums are kept in float32 (float64 for float64).

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: shapes or devices that do not fit.
        RuntimeError: the backend asked for cannot serve.

    Source: Yu et al., "S2-MLPv2: Improved Spatial-Shift MLP Architecture for Vision", 2021.
    """
    check_split_attention(u, w1, w2)
    if not fused(u, TINY[reference.split_attention]):
        return ops.mixed(reference.split_attention, u, w1, w2)
    return ops.run(ops.SplitAttentionFunction, u, w1, w2)[0]
