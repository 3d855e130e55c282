"""Two branches that a module weighs against each other, each after a ReLU: launchers of the passes over both."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import canonical_dense
from ..passes.branches import branch_grads, branch_sums, weighted_sum


def branch_mean(v1: torch.Tensor, v2: torch.Tensor) -> torch.Tensor:
    """Computes the mean over the pixels of relu(v1) + relu(v2), [N, C]. Moves 2 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2) = canonical_dense(v1, v2)
        return branch_sums(None, v1, v2, layout)


def branch_sum(v1: torch.Tensor, v2: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Computes gate[:, 0] * relu(v1) + gate[:, 1] * relu(v2), gate [N, 2, C]. Moves 3 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2) = canonical_dense(v1, v2)
        return weighted_sum(v1, v2, gate, layout)


def branch_dot(grad: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor) -> torch.Tensor:
    """Computes dgate [N, 2, C]: sums over the pixels of grad * relu(v_k). Moves 3 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2, grad) = canonical_dense(v1, v2, grad)
        return branch_sums(grad, v1, v2, layout).view(layout.N, 2, layout.C)


def branch_grad(
    grad: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor, gate: torch.Tensor, dmean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes dv_k = grad * gate[:, k] + dmean / HW where v_k > 0. Moves 5 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2, grad) = canonical_dense(v1, v2, grad)
        return branch_grads(grad, v1, v2, gate, dmean, layout)
