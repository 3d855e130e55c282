"""S2-MLPv2's split attention, fused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..ops.split_attention import SPLIT_ATTENTION
from ..reference.as_built import as_built
from ..reference.split_attention import check_split_attention
from .serve import serve

__all__ = ["FastS2MLPv2", "split_attention"]


def split_attention(u: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Shifts the thirds of u's channels and adds them, weighted by gates that sum to one in each channel.

    ``sum_k gate_k b_k`` with ``gate = softmax(w2 gelu(w1 sum(b)))``, the sum over branches and pixels. Branch 1 moves
    by one pixel: the first half of its channels along H (a quarter each way), the other half along W. Branch 2 swaps H
    and W; branch 3 does not move. At the border a pixel keeps its own value. Shifted maps are never stored.

    Args:
        u: the three branches, ``[N, 3C, H, W]``, any floating dtype, NCHW or channels_last.
        w1, w2: ``[C, C]`` and ``[3C, C]``.

    Returns:
        ``[N, C, H, W]`` in u's dtype and memory format. Sums are kept in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Yu et al., "S2-MLPv2: Improved Spatial-Shift MLP Architecture for Vision", 2021.
    """
    check_split_attention(u, w1, w2)
    return serve(SPLIT_ATTENTION, (u, w1, w2))


class FastS2MLPv2(reference.S2MLPv2):
    """Fused `reference.S2MLPv2`: same constructor, same ``state_dict``, same result.

    `split_attention` is fused. PyTorch's products take the weights of mlp1 and mlp2, in NCHW batched ones that need no
    permuted copy of a map. Layers that are not as built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``mlp2(split_attention(mlp1(x)))``, ``[N, C, H, W]`` in x's memory format; see `split_attention`."""
        self._check(x)
        if as_built(self, x, self.MLP1):
            u = _at_each_pixel(self.mlp1, x)
        else:
            u = self.mlp1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = split_attention(u, *self.gate_weights()) if as_built(self, x, self.GATE) else self.split_attention(u)
        if as_built(self, x, self.MLP2):
            return _at_each_pixel(self.mlp2, y).to(x.dtype)
        return self.mlp2(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).to(x.dtype)


def _at_each_pixel(layer: nn.Linear, x: Tensor) -> Tensor:
    """Multiplies each pixel's channels by the layer's weight: ``[N, C, H, W]`` -> ``[N, C', H, W]``, in x's format."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), layer.weight, layer.bias).permute(0, 3, 1, 2)
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_inference():
        x = x.clone()  # autograd saves x here, and refuses such tensors
    weight = layer.weight.expand(x.shape[0], -1, -1)
    return torch.baddbmm(layer.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])
