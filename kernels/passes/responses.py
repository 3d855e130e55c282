"""Passes of global response normalization: norms of channels, their part in the gradient, and dx."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import grain, next_power_of_2, reduction, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import dense_offsets, load_channels, program_tile, tile_full, tile_mask, x_offsets
from .partials import combine

_WIDEST = 1024  # channels that a program takes at a time


@triton.jit
def _sums_kernel(grad_ptr, x_ptr, sums_ptr, size, steps, TILE: tl.constexpr):
    """sums [N, splits, C], of x x, or [N, splits, 2, C], of grad x and of grad, over a share of the pixels."""
    acc_ty = sums_ptr.dtype.element_ty
    blocks = tl.cdiv(size.C, TILE.BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    p = tl.program_id(1) * steps * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
    products = tile_full(0, TILE, acc_ty)
    totals = products
    for step in range(steps):
        ps = p + step * TILE.BLOCK_P
        mask = tile_mask(c, ps, size, TILE)
        x = tl.load(x_ptr + x_offsets(n, c, ps, size, TILE), mask=mask, other=0.0).to(acc_ty)
        g = x
        if grad_ptr is not None:
            g = tl.load(grad_ptr + dense_offsets(n, c, ps, size, TILE), mask=mask, other=0.0).to(acc_ty)
            totals += g
        products += g * x
    row = n * tl.num_programs(1) + tl.program_id(1)
    if grad_ptr is None:
        tl.store(sums_ptr + row * size.C + c, tl.sum(products, 1), mask=c < size.C)
    else:
        tl.store(sums_ptr + row * 2 * size.C + c, tl.sum(products, 1), mask=c < size.C)
        tl.store(sums_ptr + (row * 2 + 1) * size.C + c, tl.sum(totals, 1), mask=c < size.C)


@triton.jit
def _norms_kernel(squares_ptr, weight_ptr, norm_ptr, factor_ptr, C, eps, BLOCK: tl.constexpr):
    """norm [N, C] and factor = 1 + weight norm / (mean(norm) + eps) of one image, from sums of squares [N, C]."""
    acc_ty = norm_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], acc_ty)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        norm = tl.sqrt(tl.load(squares_ptr + n * C + c, mask=c < C, other=0.0))
        tl.store(norm_ptr + n * C + c, norm, mask=c < C)
        total += norm
    mean = tl.sum(total, 0) / C + eps
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        norm = tl.sqrt(tl.load(squares_ptr + n * C + c, mask=c < C, other=0.0))
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        tl.store(factor_ptr + n * C + c, 1 + weight * norm / mean, mask=c < C)


@triton.jit
def _slopes_kernel(sums_ptr, weight_ptr, norm_ptr, factors_ptr, dweights_ptr, C, eps, BLOCK: tl.constexpr):
    """The factors of grad and of x in dx, [N, 2, C], and one image's parts of dweight and dbias, [N, 2, C].

    sums [N, 2, C]: of grad x, and of grad.
    """
    acc_ty = norm_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], acc_ty)
    shared = tl.zeros([BLOCK], acc_ty)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        norm = tl.load(norm_ptr + n * C + c, mask=c < C, other=0.0)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        total += norm
        shared += tl.load(sums_ptr + 2 * n * C + c, mask=c < C, other=0.0) * weight * norm
    mean = tl.sum(total, 0) / C + eps
    middle = tl.sum(shared, 0) / C / mean
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        row = 2 * n * C + c
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        norm = tl.load(norm_ptr + n * C + c, mask=c < C, other=0.0)
        dot = tl.load(sums_ptr + row, mask=c < C, other=0.0)
        # A channel that is zero everywhere has no gradient.
        slope = tl.where(norm == 0, 0.0, (dot * weight - middle) / mean / tl.where(norm == 0, 1.0, norm))
        tl.store(factors_ptr + row, 1 + weight * norm / mean, mask=c < C)
        tl.store(factors_ptr + row + C, slope, mask=c < C)
        tl.store(dweights_ptr + row, dot * norm / mean, mask=c < C)
        tl.store(dweights_ptr + row + C, tl.load(sums_ptr + row + C, mask=c < C, other=0.0), mask=c < C)


@triton.jit
def _dx_kernel(grad_ptr, x_ptr, factors_ptr, dx_ptr, size, TILE: tl.constexpr):
    """dx = grad * factor + x * slope; factors [N, 2, C]."""
    acc_ty = factors_ptr.dtype.element_ty
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    x = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
    factor, slope = load_channels(factors_ptr, 2 * n, c, size), load_channels(factors_ptr, 2 * n + 1, c, size)
    tl.store(dx_ptr + offsets, g * factor[:, None] + x * slope[:, None], mask=mask)


def channel_sums(grad: torch.Tensor | None, x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Returns sums over the pixels: of x x, [N, C], or of grad x and of grad, [N, 2, C].

    Reads x, and grad if it is given: dense in x's layout.
    """
    t, blocks, splits, steps = reduction(layout, False, *grain("mean", layout))
    kept = layout.C if grad is None else 2 * layout.C
    sums = x.new_empty((layout.N, splits, kept), dtype=accumulation_dtype(x))
    launch(
        _sums_kernel,
        layout.N * blocks,
        grad,
        x,
        sums,
        layout.sizes,
        steps,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    return sums[:, 0] if splits == 1 else combine(sums, None, sums.new_empty((layout.N, kept)))


def norms(squares: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norms of the channels and the factors of x, [N, C], from sums of squares [N, C]."""
    N, C = squares.shape
    norm, factor = torch.empty_like(squares), torch.empty_like(squares)
    launch(_norms_kernel, N, squares, weight, norm, factor, C, eps, BLOCK=_channels(C))
    return norm, factor


def slopes(
    sums: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors of grad and x in dx, and the parts of dweight and dbias of each image; both [N, 2, C]."""
    N, C = norm.shape
    factors, dweights = norm.new_empty((N, 2, C)), norm.new_empty((N, 2, C))
    launch(_slopes_kernel, N, sums, weight, norm, factors, dweights, C, eps, BLOCK=_channels(C))
    return factors, dweights


def response_input_grad(grad: torch.Tensor, x: torch.Tensor, layout: Layout, factors: torch.Tensor) -> torch.Tensor:
    """Returns dx = grad * factor + x * slope; grad is dense in x's layout. Reads both, writes dx."""
    dx = layout.empty(x)
    t = tile(layout, *grain("scale", layout))
    launch(_dx_kernel, tiles(layout, t), grad, x, factors, dx, layout.sizes, TILE=t, num_warps=t.num_warps)
    return dx


def _channels(C: int) -> int:
    """Returns the channels that a program takes at a time."""
    return min(next_power_of_2(C), _WIDEST)
