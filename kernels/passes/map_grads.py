"""The share of a channel gate's gradient that comes through the mean and maximum over channels of the gated map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import Reduction, grain, reduction
from ..core.launch import launch
from ..core.layout import Layout
from ..core.tiles import load_channels, tile_full, tile_mask, x_offsets


@triton.jit
def map_grad_tile(dmaps_ptr, argmax_c_ptr, maps_ptr, u, n, c, p, size):
    """Returns dmean_map / C + dmax_map where c is argmax_c, [BLOCK_C, BLOCK_P]; dmaps and maps are [N, 2, HW].

    With maps_ptr and argmax_c < 0, -argmax_c maxima share dmax_map: the elements of u that equal maps' maximum.
    """
    HW = size.HW
    dmean = tl.load(dmaps_ptr + n * 2 * HW + p, mask=p < HW, other=0.0) / size.C
    dmax = tl.load(dmaps_ptr + (n * 2 + 1) * HW + p, mask=p < HW, other=0.0)
    argmax = tl.load(argmax_c_ptr + n * HW + p, mask=p < HW, other=-1)
    hits = c[:, None] == argmax[None, :]
    if maps_ptr is not None:
        maximum = tl.load(maps_ptr + (n * 2 + 1) * HW + p, mask=p < HW, other=0.0)
        hits = tl.where(argmax[None, :] < 0, u == maximum[None, :], hits)
        dmax /= tl.maximum(-argmax, 1)
    return dmean[None, :] + tl.where(hits, dmax[None, :], 0.0)


@triton.jit
def _map_grads_kernel(
    x_ptr,
    channel_gate_ptr,
    maps_ptr,
    dmaps_ptr,
    argmax_c_ptr,
    dchannel_ptr,
    size,
    partials,
    first_partial,
    steps,
    TILE: tl.constexpr,
):
    """dchannel [N, partials, C], from first_partial on: sum over pixels of x (dmean_map / C + dmax_map at argmax_c).

    With maps_ptr, argmax_c may count ties: the elements of x * channel_gate that equal the maximum.
    """
    acc_ty = dmaps_ptr.dtype.element_ty
    blocks = tl.cdiv(size.C, TILE.BLOCK_C)
    share = tl.program_id(1)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    acc = tile_full(0, TILE, acc_ty)
    for step in range(steps):
        p = (share * steps + step) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
        mask = tile_mask(c, p, size, TILE)
        x = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
        u = x
        if maps_ptr is not None:
            u *= load_channels(channel_gate_ptr, n, c, size)[:, None]
        acc += x * map_grad_tile(dmaps_ptr, argmax_c_ptr, maps_ptr, u, n, c, p, size)
    row = (n * partials + first_partial + share) * size.C
    tl.store(dchannel_ptr + row + c, tl.sum(acc, 1), mask=c < size.C)


def map_grads_reduction(layout: Layout) -> Reduction:
    """Returns the reduction of `map_grads`, which writes one partial a split; each block of channels reads the maps."""
    return reduction(layout, False, *grain("map gradients", layout))


def map_grads(
    x: torch.Tensor,
    layout: Layout,
    dmaps: torch.Tensor,
    argmax_c: torch.Tensor,
    dchannel: torch.Tensor,
    channel_gate: torch.Tensor | None = None,
    maps: torch.Tensor | None = None,
) -> None:
    """Fills the last partials of dchannel [N, S, C] with the sums over pixels of x * du. Reads x once.

    With channel_gate and maps, argmax_c may count ties.
    """
    t, blocks, splits, steps = map_grads_reduction(layout)
    partials = dchannel.shape[1]
    launch(
        _map_grads_kernel,
        layout.N * blocks,
        x,
        channel_gate,
        maps,
        dmaps,
        argmax_c,
        dchannel,
        layout.sizes,
        partials,
        partials - splits,
        steps,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
