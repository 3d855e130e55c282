"""Passes of global response normalization: norms of channels, their part in the gradient, and dx."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import grain, next_power_of_2, reduction, tile, tiles
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..core.tiles import dense_offsets, load_channels, program_tile, tile_full, tile_mask, x_offsets
from .partials import partials_sum

_WIDEST = 2048  # channels that a program takes at a time, beside all partials of them


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
def _norms_kernel(
    sums_ptr, weight_ptr, norm_ptr, factor_ptr, C, splits, eps, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """norm [N, C] and factor = 1 + weight norm / (mean(norm) + eps) of one image."""
    acc_ty = norm_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], acc_ty)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        norm = tl.sqrt(partials_sum(sums_ptr, n, c, C, splits, 1, BLOCK_S))
        tl.store(norm_ptr + n * C + c, norm, mask=c < C)
        total += tl.where(c < C, norm, 0.0)
    mean = tl.sum(total, 0) / C + eps
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        norm = tl.sqrt(partials_sum(sums_ptr, n, c, C, splits, 1, BLOCK_S))  # not read back from what others wrote
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        tl.store(factor_ptr + n * C + c, 1 + weight * norm / mean, mask=c < C)


@triton.jit
def _slopes_kernel(
    sums_ptr,
    weight_ptr,
    norm_ptr,
    factors_ptr,
    dweights_ptr,
    C,
    splits,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The factors of grad and of x in dx, [N, 2, C], and one image's parts of dweight and dbias, [N, 2, C]."""
    acc_ty = norm_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], acc_ty)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        total += tl.load(norm_ptr + n * C + c, mask=c < C, other=0.0)
    mean = tl.sum(total, 0) / C + eps
    shared = tl.zeros([BLOCK], acc_ty)
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        response = tl.load(norm_ptr + n * C + c, mask=c < C, other=0.0) / mean
        shared += partials_sum(sums_ptr, n, c, C, splits, 2, BLOCK_S) * weight * response
    middle = tl.sum(shared, 0) / C
    for start in range(0, C, BLOCK):
        c = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        norm = tl.load(norm_ptr + n * C + c, mask=c < C, other=0.0)
        dot = partials_sum(sums_ptr, n, c, C, splits, 2, BLOCK_S)
        # A channel that is zero everywhere has no gradient.
        slope = tl.where(norm == 0, 0.0, (dot * weight - middle) / mean / tl.where(norm == 0, 1.0, norm))
        row = 2 * n * C + c
        tl.store(factors_ptr + row, 1 + weight * norm / mean, mask=c < C)
        tl.store(factors_ptr + row + C, slope, mask=c < C)
        tl.store(dweights_ptr + row, dot * norm / mean, mask=c < C)
        tl.store(dweights_ptr + row + C, partials_sum(sums_ptr + C, n, c, C, splits, 2, BLOCK_S), mask=c < C)


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
    """Returns partial sums over the pixels: of x x, [N, S, C], or of grad x and of grad, [N, S, 2, C].

    Reads x, and grad if it is given: dense in x's layout.
    """
    t, blocks, splits, steps = reduction(layout, False, *grain("mean", layout))
    shape = (layout.N, splits, layout.C) if grad is None else (layout.N, splits, 2, layout.C)
    sums = x.new_empty(shape, dtype=accumulation_dtype(x))
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
    return sums


def norms(sums: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norms of the channels and the factors of x, [N, C], from partial sums of squares [N, S, C]."""
    N, S, C = sums.shape
    norm, factor = sums.new_empty((N, C)), sums.new_empty((N, C))
    launch(_norms_kernel, N, sums, weight, norm, factor, C, S, eps, **_blocks(S, C))
    return norm, factor


def slopes(
    sums: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors of grad and x in dx, and the parts of dweight and dbias of each image; both [N, 2, C]."""
    N, S, _, C = sums.shape
    factors, dweights = sums.new_empty((N, 2, C)), sums.new_empty((N, 2, C))
    launch(_slopes_kernel, N, sums, weight, norm, factors, dweights, C, S, eps, **_blocks(S, C))
    return factors, dweights


def response_input_grad(grad: torch.Tensor, x: torch.Tensor, layout: Layout, factors: torch.Tensor) -> torch.Tensor:
    """Returns dx = grad * factor + x * slope; grad is dense in x's layout. Reads both, writes dx."""
    dx = layout.empty(x)
    t = tile(layout, *grain("scale", layout))
    launch(_dx_kernel, tiles(layout, t), grad, x, factors, dx, layout.sizes, TILE=t, num_warps=t.num_warps)
    return dx


def _blocks(splits: int, channels: int) -> dict[str, int]:
    """Returns as many channels as a program takes at a time beside all their partials, and those."""
    block_s = next_power_of_2(splits)
    return {"BLOCK_S": block_s, "BLOCK": max(min(next_power_of_2(channels), _WIDEST // block_s), 16)}
