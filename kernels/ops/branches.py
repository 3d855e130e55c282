"""The passes over two branches that a module weighs against each other; each branch is taken after a ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import TILE, reduction, tile, tiles
from ..core.launch import device_guard, launch
from ..core.layout import Layout, accumulation_dtype, canonical
from ..core.tiles import RELU, activate, activation_grad, program_tile, tile_mask, tile_offsets
from ..passes.pool import combine


@triton.jit
def _branch_tile(v_ptr, offsets, mask, acc_ty: tl.constexpr):
    return activate(tl.load(v_ptr + offsets, mask=mask, other=0.0).to(acc_ty), RELU)


@triton.jit
def _branch_sums_kernel(
    grad_ptr, v1_ptr, v2_ptr, parts_ptr, C, HW, divisor, steps,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums over parts of the pixels: of both branches, [N, parts, C], divided by `divisor`; or, with a grad,

    of its product with each branch, [N, parts, 2, C].
    """
    acc_ty: tl.constexpr = parts_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    second = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    for step in range(steps):
        p = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
        u1 = _branch_tile(v1_ptr, offsets, mask, acc_ty)
        u2 = _branch_tile(v2_ptr, offsets, mask, acc_ty)
        if grad_ptr is None:
            first += u1 + u2
        else:
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            first += g * u1
            second += g * u2
    row = n * tl.num_programs(1) + part
    if grad_ptr is None:
        tl.store(parts_ptr + row * C + c, tl.sum(first, 1) / divisor, mask=c < C)
    else:
        tl.store(parts_ptr + row * 2 * C + c, tl.sum(first, 1), mask=c < C)
        tl.store(parts_ptr + (row * 2 + 1) * C + c, tl.sum(second, 1), mask=c < C)


@triton.jit
def _branch_sum_kernel(
    v1_ptr, v2_ptr, gate_ptr, y_ptr, C, HW,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = gate[:, 0] * relu(v1) + gate[:, 1] * relu(v2), gate [N, 2, C]."""
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    g1 = tl.load(gate_ptr + 2 * n * C + c, mask=c < C, other=0.0)[:, None]
    g2 = tl.load(gate_ptr + (2 * n + 1) * C + c, mask=c < C, other=0.0)[:, None]
    u1 = _branch_tile(v1_ptr, offsets, mask, acc_ty)
    u2 = _branch_tile(v2_ptr, offsets, mask, acc_ty)
    tl.store(y_ptr + offsets, g1 * u1 + g2 * u2, mask=mask)


@triton.jit
def _branch_grad_kernel(
    grad_ptr, v1_ptr, v2_ptr, gate_ptr, dmean_ptr, dv1_ptr, dv2_ptr, C, HW,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dv_k = (grad * gate[:, k] + dmean / HW) where v_k > 0; gate [N, 2, C], dmean [N, C]."""
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    g1 = tl.load(gate_ptr + 2 * n * C + c, mask=c < C, other=0.0)[:, None]
    g2 = tl.load(gate_ptr + (2 * n + 1) * C + c, mask=c < C, other=0.0)[:, None]
    dmean = (tl.load(dmean_ptr + n * C + c, mask=c < C, other=0.0) / HW)[:, None]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    v1 = tl.load(v1_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    v2 = tl.load(v2_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(dv1_ptr + offsets, activation_grad(grad * g1 + dmean, v1, RELU), mask=mask)
    tl.store(dv2_ptr + offsets, activation_grad(grad * g2 + dmean, v2, RELU), mask=mask)


def _dense(v1: torch.Tensor, *others: torch.Tensor) -> tuple[Layout, list[torch.Tensor]]:
    """v1's layout, dense, and all tensors in it; a copy is made only of one that is not."""
    _, layout = canonical(v1)
    v1, layout = canonical(layout.dense(v1))
    return layout, [v1, *map(layout.dense, others)]


def _sums(grad: torch.Tensor | None, v1: torch.Tensor, v2: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`_branch_sums_kernel` and the sum of its parts in order, [N, C] or [N, 2 C]. Reads each map once."""
    t, blocks, parts, steps = reduction(layout, over_c=False)
    columns = layout.C if grad is None else 2 * layout.C
    partial = v1.new_empty((layout.N, parts, columns), dtype=accumulation_dtype(v1))
    launch(
        _branch_sums_kernel, layout.N * blocks,
        grad, v1, v2, partial, layout.C, layout.HW, layout.HW, steps, **t._asdict(), parts=parts,
    )  # fmt: skip
    return combine(partial, None, partial.new_empty((layout.N, columns))) if parts > 1 else partial[:, 0]


def branch_mean(v1: torch.Tensor, v2: torch.Tensor) -> torch.Tensor:
    """Mean over the pixels of relu(v1) + relu(v2), [N, C]. Moves 2 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2) = _dense(v1, v2)
        return _sums(None, v1, v2, layout)


def branch_sum(v1: torch.Tensor, v2: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """gate[:, 0] * relu(v1) + gate[:, 1] * relu(v2); gate [N, 2, C]. Moves 3 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2) = _dense(v1, v2)
        y, t = layout.empty(v1), tile(layout, TILE)
        launch(_branch_sum_kernel, tiles(layout, t), v1, v2, gate, y, layout.C, layout.HW, **t._asdict())
        return y


def branch_dot(grad: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor) -> torch.Tensor:
    """dgate [N, 2, C]: sums over the pixels of grad * relu(v_k). Moves 3 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2, grad) = _dense(v1, v2, grad)
        return _sums(grad, v1, v2, layout).view(layout.N, 2, layout.C)


def branch_grad(
    grad: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor, gate: torch.Tensor, dmean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dv1, dv2): grad * gate[:, k] + dmean / HW where v_k > 0. Moves 5 times the bytes of a branch."""
    with device_guard(v1):
        layout, (v1, v2, grad) = _dense(v1, v2, grad)
        dv1, dv2, t = layout.empty(v1), layout.empty(v1), tile(layout, TILE)
        launch(
            _branch_grad_kernel, tiles(layout, t),
            grad, v1, v2, gate, dmean, dv1, dv2, layout.C, layout.HW, **t._asdict(),
        )  # fmt: skip
        return dv1, dv2
