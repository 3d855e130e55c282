"""S2-MLPv2's split attention: passes over the shifted branches, and between them the gate's algebra in PyTorch.

Branches are shifted as they are read. Forward reads u twice and writes y. The sum, its first layer and the gate are
saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference.split_attention import ALONG_H, ALONG_W, BRANCHES, shifted_branches
from .autograd import without_autocast
from .declare import composed_op
from .layout import accumulation_dtype, empty_map, memory_format
from .library import define


def _stacked(u: Tensor) -> Tensor:
    return torch.stack(shifted_branches(u), 1).to(accumulation_dtype(u))  # [N, 3, C, H, W]


def _branch_map(u: Tensor) -> Tensor:
    n, c, h, w = u.shape
    shape = n, c // BRANCHES, h, w
    return torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=memory_format(u))


def _gate_shape(u: Tensor) -> tuple[int, int, int]:
    return u.shape[0], BRANCHES, u.shape[1] // BRANCHES


def _unshift(grad: Tensor, directions: Any) -> Tensor:
    """The transpose of `reference.split_attention.shift`: sends gradients back to the pixels that were moved."""
    quarter, channels = grad.shape[1] // 4, grad.shape[1]
    given = []
    for part, (dim, forwards) in zip(grad.split([quarter] * 3 + [channels - 3 * quarter], 1), directions, strict=True):
        size = part.shape[dim]
        first, last = part.narrow(dim, 0, 1), part.narrow(dim, size - 1, 1)
        lost = torch.zeros_like(first)
        inner = part.narrow(dim, 1 if forwards else 0, size - 1)
        kept = torch.cat([first, torch.zeros_like(inner)] if forwards else [torch.zeros_like(inner), last], dim)
        given.append(kept + torch.cat([inner, lost] if forwards else [lost, inner], dim))
    return torch.cat(given, 1)


def _shift_grad_reference(grad: Tensor, u: Tensor, gate: Tensor, dtotal: Tensor) -> Tensor:
    terms = (grad[:, None] * gate[:, :, :, None, None] + dtotal[:, None, :, None, None]).unbind(1)
    moved = _unshift(terms[0], ALONG_H + ALONG_W), _unshift(terms[1], ALONG_W + ALONG_H), terms[2]
    return empty_map(u).copy_(torch.cat(moved, 1))


_BRANCHES = "N 3*c H W : floating strided"
shift_total = define(
    "shift_total(Tensor u) -> Tensor total",
    "split_attention",
    lambda u: _stacked(u).sum((1, 3, 4)),
    ("N c",),
    {"u": _BRANCHES},
)
shift_sum = define(
    "shift_sum(Tensor u, Tensor gate) -> Tensor y",
    "split_attention",
    lambda u, gate: _branch_map(u).copy_((_stacked(u) * gate[:, :, :, None, None]).sum(1)),
    (lambda given: _branch_map(given["u"]),),
    {"u": _BRANCHES, "gate": "N 3 c"},
)
shift_dot = define(
    "shift_dot(Tensor grad, Tensor u) -> Tensor dgate",
    "split_attention",
    lambda grad, u: (_stacked(u) * grad[:, None]).sum((3, 4)),
    ("N 3 c",),
    {"u": _BRANCHES, "grad": "N c H W : u strided"},
)
shift_grad = define(
    "shift_grad(Tensor grad, Tensor u, Tensor gate, Tensor dtotal) -> Tensor du",
    "split_attention",
    _shift_grad_reference,
    ("like u",),
    {"u": _BRANCHES, "grad": "N c H W : u strided", "gate": "N 3 c", "dtotal": "N c"},
)


@without_autocast
def _forward(u: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
    total = shift_total(u).double()  # the sum over all pixels makes large logits, and the softmax magnifies rounding
    z = F.linear(total, w1.double())
    gate = torch.softmax(F.linear(F.gelu(z), w2.double()).view(_gate_shape(u)), 1).to(accumulation_dtype(u))
    return shift_sum(u, gate), total, z, gate


@without_autocast
def _gradients(grad: Tensor, tensors: Any, small: Any, options: Any, needs: Any) -> tuple[Tensor | None, ...]:
    u, w1, w2 = tensors
    total, z, gate = small
    dgate = shift_dot(grad, u)
    dlogits = (gate.double() * (dgate - (gate.double() * dgate).sum(1, keepdim=True))).flatten(1)
    dz = torch.ops.aten.gelu_backward(dlogits @ w2.double(), z)
    du = shift_grad(grad, u, gate, (dz @ w1.double()).to(gate.dtype)) if needs[0] else None
    return du, dz.t() @ total, dlogits.t() @ F.gelu(z)


SPLIT_ATTENTION = composed_op("split_attention", _forward, _gradients, reference.split_attention, partial=True, tiny=49)
