"""The passes over x of a channel gate whose mathematics is done elsewhere."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical, contiguous
from ..passes.gate import apply_gates, gate_grads
from ..passes.input_grad import Terms, input_grad
from ..passes.partials import combine
from ..passes.pool import mean_hw


def channel_mean(x: torch.Tensor) -> torch.Tensor:
    """Computes the mean over the pixels [N, C] of x [N, C, H, W]. Reads x once."""
    with device_guard(x):
        x, layout = canonical(x)
        return mean_hw(x, layout)


def channel_scale_fwd(
    x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> torch.Tensor:
    """Computes y = act(x * gate + residual); x, residual [N, C, H, W], gate [N, C]. Moves 2 times the bytes of x."""
    with device_guard(x):
        x, layout = canonical(x)
        return apply_gates(x, layout, gate.contiguous(), None, residual, activation)


def channel_affine(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> torch.Tensor:
    """Computes y = act(x * scale + shift + residual), scale and shift [N, C]. Moves 2 times the bytes of x."""
    with device_guard(x):
        x, layout = canonical(x)
        return apply_gates(x, layout, scale.contiguous(), None, residual, activation, shift=shift.contiguous())


def channel_scale_bwd(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dgate [N, C], the sum over the pixels of g' x, g' = grad * act'(x * gate + residual).

    Returns dgate, dresidual. Moves 2 times the bytes of x; with an activation g' is also written, as dresidual (else
    empty: it is grad).
    """
    with device_guard(x):
        x, layout = canonical(x)
        gate = gate.contiguous()
        _, dresidual, dgate, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        return combine(dgate, None, torch.empty_like(gate)), dresidual


def channel_input_grad(
    grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, dmean: torch.Tensor | None
) -> torch.Tensor:
    """Computes dx = grad * gate + dmean / HW in x's layout; gate, dmean [N, C].

    Moves 2 times the bytes of x, and does not read x itself.
    """
    with device_guard(x):
        x, layout = canonical(x)
        terms = Terms(grad=layout.dense(grad), channel_gate=gate.contiguous(), dpooled=contiguous(dmean))
        return input_grad(x, layout, terms)
