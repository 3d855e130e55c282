"""Global response normalization: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.gate import apply_gates
from ..passes.partials import combine
from ..passes.responses import channel_sums, norms, response_input_grad, slopes


def grn_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes y = x * (1 + weight * n) + bias, n the norm of each channel beside the mean norm of the image.

    x [N, C, H, W]; weight, bias [C], any dtype. Returns y and the norms [N, C]. Moves 3 times the bytes of x: read to
    pool, read to scale, write y.
    """
    with device_guard(x):
        x, layout = canonical(x)
        norm, factor = norms(channel_sums(None, x, layout), weight.contiguous(), eps)
        shift = bias.to(norm.dtype).expand(layout.N, -1).contiguous()
        return apply_gates(x, layout, factor, None, None, 0, shift=shift), norm


def grn_bwd(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes dx, dweight [C] and dbias [C].

    Moves 5 times the bytes of x: read grad and x to pool, read both, write dx.
    """
    with device_guard(x):
        x, layout = canonical(x)
        grad = layout.dense(grad)
        factors, parts = slopes(channel_sums(grad, x, layout), weight.contiguous(), norm.contiguous(), eps)
        dx = response_input_grad(grad, x, layout, factors)
        sums = combine(parts.view(1, layout.N, 2 * layout.C), None, parts.new_empty((1, 2 * layout.C)))
        dweight, dbias = (t.to(weight.dtype, copy=True) for t in sums.view(2, layout.C))  # results share no memory
        return dx, dweight, dbias
