"""The passes over x of any channel gate whose mathematics stands elsewhere."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.gate import gate_grads, scale
from ..passes.input_grad import input_grad
from ..passes.pool import combine, mean_hw


def channel_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over the pixels [N, C]. x [N, C, H, W]. Reads x once."""
    with device_guard(x):
        x, layout = canonical(x)
        return mean_hw(x, layout)


def channel_scale_fwd(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> torch.Tensor:
    """y = act(x * gate + residual); x, residual [N, C, H, W], gate [N, C]. Moves 2 times the bytes of x."""
    with device_guard(x):
        x, layout = canonical(x)
        return scale(x, layout, gate.contiguous(), None, residual, activation)


def channel_affine(
    x: torch.Tensor, scale_by: torch.Tensor, shift: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> torch.Tensor:
    """y = act(x * scale_by + shift + residual), both [N, C]. Moves 2 times the bytes of x."""
    with device_guard(x):
        x, layout = canonical(x)
        return scale(x, layout, scale_by.contiguous(), None, residual, activation, shift=shift.contiguous())


def channel_scale_bwd(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate [N, C], dresidual); dgate = sum over the pixels of g' x, g' = grad * act'(x * gate + residual).

    Moves 2 times the bytes of x; with an activation g' is written, too, as dresidual (else empty: it is grad).
    """
    with device_guard(x):
        x, layout = canonical(x)
        gate = gate.contiguous()
        _, dresidual, parts, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        return combine(parts, None, torch.empty_like(gate)), dresidual


def channel_input_grad(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, dmean: torch.Tensor | None
) -> torch.Tensor:
    """dx = grad * gate + dmean / HW, in x's layout; gate, dmean [N, C]. Moves 2 times the bytes of x, not x itself."""
    with device_guard(x):
        x, layout = canonical(x)
        dmean = None if dmean is None else dmean.contiguous()
        return input_grad(x, layout, grad=layout.dense(grad), channel_gate=gate.contiguous(), dpooled=dmean)
