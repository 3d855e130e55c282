"""S2-MLPv2's split attention: launchers of the passes over three branches.

u [N, 3C, H, W] holds all three; two of them are shifted as they are read. Each is as large as y [N, C, H, W].
"""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..passes.shifted_branches import BRANCHES, ShiftedBranches, shift_grads, shift_sums, weighted_shift_sum


def shift_total(u: torch.Tensor) -> torch.Tensor:
    """Computes the sum over the shifted branches and the pixels, [N, C]. Moves 3 times the bytes of a branch."""
    with device_guard(u):
        return shift_sums(None, ShiftedBranches(u))


def shift_sum(u: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Computes the sum over the shifted branches of gate [N, 3, C] * branch. Moves 4 times the bytes of a branch."""
    with device_guard(u):
        return weighted_shift_sum(ShiftedBranches(u), gate)


def shift_dot(grad: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Computes dgate [N, 3, C]: sums over the pixels of grad * branch. Moves 4 times the bytes of a branch."""
    with device_guard(u):
        b = ShiftedBranches(u)
        return shift_sums(b.layout.dense(grad), b).view(b.layout.N, BRANCHES, b.layout.C)


def shift_grad(grad: torch.Tensor, u: torch.Tensor, gate: torch.Tensor, dtotal: torch.Tensor) -> torch.Tensor:
    """Computes du [N, 3C, H, W], like u, whose values are not read.

    Moves 4 times the bytes of a branch, and its border.
    """
    with device_guard(u):
        return shift_grads(ShiftedBranches(u), grad, gate, dtotal)
