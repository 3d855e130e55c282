"""Passes over two branches that a module weighs against each other. ReLU is applied to each as it is read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import accumulation_dtype, to_map
from .library import define
from .signature import MAP


def _rectified(v1: Tensor, v2: Tensor) -> Tensor:
    return torch.stack([F.relu(v1), F.relu(v2)], 1).to(accumulation_dtype(v1))  # [N, 2, C, H, W]


def _branch_mean_reference(v1: Tensor, v2: Tensor) -> Tensor:
    return _rectified(v1, v2).sum(1).mean((2, 3))


def _branch_sum_reference(v1: Tensor, v2: Tensor, gate: Tensor) -> Tensor:
    return to_map((_rectified(v1, v2) * gate[:, :, :, None, None]).sum(1), v1)


def _branch_dot_reference(grad: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
    return (_rectified(v1, v2) * grad[:, None]).sum((3, 4))


def _branch_grad_reference(grad: Tensor, v1: Tensor, v2: Tensor, gate: Tensor, dmean: Tensor) -> tuple[Tensor, ...]:
    grad, dmean = grad.to(gate.dtype), dmean[:, :, None, None] / (v1.shape[2] * v1.shape[3])
    pairs = zip((v1, v2), gate[:, :, :, None, None].unbind(1), strict=True)
    first, second = (to_map(torch.where(v <= 0, 0.0, grad * g + dmean), v1) for v, g in pairs)
    return first, second


_BRANCHES = {"v1": MAP, "v2": "like v1"}
branch_mean = define(
    "branch_mean(Tensor v1, Tensor v2) -> Tensor mean",
    "branches",
    _branch_mean_reference,
    ("N C",),
    _BRANCHES,
)
branch_sum = define(
    "branch_sum(Tensor v1, Tensor v2, Tensor gate) -> Tensor y",
    "branches",
    _branch_sum_reference,
    ("like v1",),
    {**_BRANCHES, "gate": "N 2 C"},
)
branch_dot = define(
    "branch_dot(Tensor grad, Tensor v1, Tensor v2) -> Tensor dgate",
    "branches",
    _branch_dot_reference,
    ("N 2 C",),
    {**_BRANCHES, "grad": "like v1"},
)
branch_grad = define(
    "branch_grad(Tensor grad, Tensor v1, Tensor v2, Tensor gate, Tensor dmean) -> (Tensor dv1, Tensor dv2)",
    "branches",
    _branch_grad_reference,
    ("like v1", "like v1"),
    {**_BRANCHES, "grad": "like v1", "gate": "N 2 C", "dmean": "N C"},
)
