"""Passes over two branches that a module weighs against each other; each branch is taken after a ReLU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import RELU, activate, activation_grad
from ..core.heuristics import reduction, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import dense_offsets, load_channels, program_tile, tile_full, tile_mask
from .partials import combine


@triton.jit
def _branch_tile(v_ptr, offsets, mask, acc_ty: tl.constexpr):
    return activate(tl.load(v_ptr + offsets, mask=mask, other=0.0).to(acc_ty), RELU)


@triton.jit
def _load_gates(gate_ptr, n, c, size):
    """Returns both gates of channels c, [BLOCK_C, 1], from [N, 2, C]."""
    g1 = tl.load(gate_ptr + 2 * n * size.C + c, mask=c < size.C, other=0.0)[:, None]
    g2 = tl.load(gate_ptr + (2 * n + 1) * size.C + c, mask=c < size.C, other=0.0)[:, None]
    return g1, g2


@triton.jit
def _branch_sums_kernel(grad_ptr, v1_ptr, v2_ptr, partials_ptr, size, divisor, steps, TILE: tl.constexpr):
    """Sums over shares of the pixels: of both branches / divisor, [N, splits, C].

    With grad_ptr: of its product with each branch, [N, splits, 2, C].
    """
    acc_ty: tl.constexpr = partials_ptr.dtype.element_ty
    C = size.C
    blocks = tl.cdiv(C, TILE.BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    share = tl.program_id(1)
    c = tl.program_id(0) % blocks * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    first = tile_full(0, TILE, acc_ty)
    second = tile_full(0, TILE, acc_ty)
    for step in range(steps):
        p = (share * steps + step) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
        mask = tile_mask(c, p, size, TILE)
        offsets = dense_offsets(n, c, p, size, TILE)
        u1 = _branch_tile(v1_ptr, offsets, mask, acc_ty)
        u2 = _branch_tile(v2_ptr, offsets, mask, acc_ty)
        if grad_ptr is None:
            first += u1 + u2
        else:
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            first += g * u1
            second += g * u2
    row = n * tl.num_programs(1) + share
    if grad_ptr is None:
        tl.store(partials_ptr + row * C + c, tl.sum(first, 1) / divisor, mask=c < C)
    else:
        tl.store(partials_ptr + row * 2 * C + c, tl.sum(first, 1), mask=c < C)
        tl.store(partials_ptr + (row * 2 + 1) * C + c, tl.sum(second, 1), mask=c < C)


@triton.jit
def _weighted_sum_kernel(v1_ptr, v2_ptr, gate_ptr, y_ptr, size, TILE: tl.constexpr):
    """y = gate[:, 0] * relu(v1) + gate[:, 1] * relu(v2), gate [N, 2, C]."""
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    g1, g2 = _load_gates(gate_ptr, n, c, size)
    u1 = _branch_tile(v1_ptr, offsets, mask, acc_ty)
    u2 = _branch_tile(v2_ptr, offsets, mask, acc_ty)
    tl.store(y_ptr + offsets, g1 * u1 + g2 * u2, mask=mask)


@triton.jit
def _branch_grads_kernel(grad_ptr, v1_ptr, v2_ptr, gate_ptr, dmean_ptr, dv1_ptr, dv2_ptr, size, TILE: tl.constexpr):
    """dv_k = (grad * gate[:, k] + dmean / HW) where v_k > 0; gate [N, 2, C], dmean [N, C]."""
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    g1, g2 = _load_gates(gate_ptr, n, c, size)
    dmean = (load_channels(dmean_ptr, n, c, size) / size.HW)[:, None]
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    v1 = tl.load(v1_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    v2 = tl.load(v2_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(dv1_ptr + offsets, activation_grad(grad * g1 + dmean, v1, RELU), mask=mask)
    tl.store(dv2_ptr + offsets, activation_grad(grad * g2 + dmean, v2, RELU), mask=mask)


def branch_sums(grad: torch.Tensor | None, v1: torch.Tensor, v2: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns the mean over pixels of relu(v1) + relu(v2), [N, C], or with grad sums of grad * relu(v_k), [N, 2 C].

    Reads each map once.
    """
    t, blocks, splits, steps = reduction(layout, over_c=False)
    columns = layout.C if grad is None else 2 * layout.C
    partials = v1.new_empty((layout.N, splits, columns), dtype=accumulation_dtype(v1))
    launch(
        _branch_sums_kernel,
        layout.N * blocks,
        grad,
        v1,
        v2,
        partials,
        layout.sizes,
        layout.HW,
        steps,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return combine(partials, None, partials.new_empty((layout.N, columns))) if splits > 1 else partials[:, 0]


def weighted_sum(v1: torch.Tensor, v2: torch.Tensor, gate: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns gate[:, 0] * relu(v1) + gate[:, 1] * relu(v2). Reads v1 and v2, writes y."""
    y, t = layout.empty(v1), tile(layout)
    launch(_weighted_sum_kernel, tiles(layout, t), v1, v2, gate, y, layout.sizes, TILE=t, num_warps=t.num_warps)
    return y


def branch_grads(
    grad: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    gate: torch.Tensor,
    dmean: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (dv1, dv2). Reads grad, v1 and v2, writes both gradients."""
    dv1, dv2, t = layout.empty(v1), layout.empty(v1), tile(layout)
    launch(
        _branch_grads_kernel,
        tiles(layout, t),
        grad,
        v1,
        v2,
        gate,
        dmean,
        dv1,
        dv2,
        layout.sizes,
        TILE=t,
        num_warps=t.num_warps,
    )
    return dv1, dv2
