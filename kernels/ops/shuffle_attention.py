"""Shuffle attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical
from ..passes.self_gate.gate import Gate
from ..passes.self_gate.passes import self_gate, self_gate_bwd
from ..passes.self_gate.shuffle_grads import shuffle_weight_grads
from ..passes.self_gate.tiles import SHUFFLE, contiguous_weights


def shuffle_attention_fwd(
    x: torch.Tensor,
    cweight: torch.Tensor,
    cbias: torch.Tensor,
    sweight: torch.Tensor,
    sbias: torch.Tensor,
    gn_weight: torch.Tensor,
    gn_bias: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes y = act(shuffle(x * gate) + residual); see `reference.shuffle_attention`.

    Returns y, and mean and rstd [N, C] in the order of x. Moves twice the bytes of x if planes fit in a tile, else 3
    times; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        weights = contiguous_weights(cweight, cbias, sweight, sbias, gn_weight, gn_bias)
        return self_gate(x, layout, Gate(SHUFFLE, weights, eps), residual, activation)


def shuffle_attention_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    cweight: torch.Tensor,
    cbias: torch.Tensor,
    sweight: torch.Tensor,
    sbias: torch.Tensor,
    gn_weight: torch.Tensor,
    gn_bias: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes dx, dresidual and the gradients of the six weights.

    Moves 3 times the bytes of x if planes fit in a tile, else 5 times.
    """
    with device_guard(x):
        x, layout = canonical(x)
        weights = contiguous_weights(cweight, cbias, sweight, sbias, gn_weight, gn_bias)
        gate = Gate(SHUFFLE, weights)
        dx, dresidual, sums = self_gate_bwd(grad, x, layout, gate, mean, rstd, residual, activation)
        return dx, dresidual, *shuffle_weight_grads(sums, mean, rstd, weights)
