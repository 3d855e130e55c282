"""Launch parameters as plain functions of sizes and layout; launchers and compile-time tests call the same ones.

There is no autotuning: the first call of a shape costs one compilation, and the order of a sum never depends on timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import Layout

INNER_BLOCK = 256  # elements along the dense axis: a warp reads 512 bytes of bfloat16 in 16-byte loads
PROGRAMS = 1024  # about eight per streaming multiprocessor of the largest chips
MIN_STEPS = 4  # tiles that are worth a partial result and its share of a second launch
MAX_STEPS = 64  # tiles that a program adds up in sequence: each addition rounds, and equal values round alike
TILE = 2048  # elements of a tile that accumulates
SCALE_TILE = 4096  # elements of a tile that is read and written once
PLANE_TILE = 16384  # elements of a tile of whole planes, kept in registers between two uses


# triton.cdiv and triton.next_power_of_2 can also be called from kernels, and so cost microseconds here.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def amd() -> bool:
    """True if the kernels are for AMD's chips, whose warps have 64 threads instead of 32."""
    return torch.version.hip is not None


def registers_for(x: torch.Tensor, warps: int) -> dict[str, int]:
    """Caps registers per thread so that `warps` warps fit on an SM.

    Without a cap ptxas may spill to fit one more program.
    """
    return {} if amd() or x.is_xpu else {"maxnreg": min(65536 // 32 // warps, 255)}


class Tile(NamedTuple):
    """A `[BLOCK_C, BLOCK_P]` tile of one image and the warps that share it; kernels take it as ``TILE``."""

    CHANNELS_LAST: bool
    ALIGN: int
    BLOCK_C: int
    BLOCK_P: int
    num_warps: int


class Grain(NamedTuple):
    """The size of a tile: all its elements, those along the dense axis, and those of a thread, loaded together."""

    elements: int = TILE
    inner_block: int = INNER_BLOCK
    per_thread: int = 16


# The passes over x, in nchw and in channels_last: the fastest of 22 grains each, measured on an H200 with
# [64, 256, 56, 56] in bfloat16; a copy takes 53 us. The comments give us with the default grain -> with this one.
GRAINS = {
    "mean": (Grain(per_thread=32), Grain()),  # 45 -> 39; 47
    "mean and maximum": (Grain(per_thread=8), Grain(1024, per_thread=32)),  # 60 -> 51; 106 -> 62
    "maps": (Grain(inner_block=128), Grain(per_thread=32)),  # mean and maximum over the channels: 126 -> 93; 73 -> 68
    "scale": (Grain(SCALE_TILE), Grain()),  # 54; 56 -> 54
    "gate gradient": (Grain(), Grain(inner_block=128)),  # 61; 68 -> 63
    "gate gradients": (Grain(1024, per_thread=32), Grain(1024, per_thread=8)),  # of both gates: 77 -> 66; 98 -> 76
    "map gradients": (Grain(SCALE_TILE), Grain()),  # 51; 53 -> 46
    "input gradient": (Grain(SCALE_TILE), Grain()),  # 54; 55 -> 53
    "input gradient, maps": (Grain(SCALE_TILE, 128), Grain(SCALE_TILE, per_thread=32)),  # 86 -> 70; 86 -> 72
}


def grain(name: str, layout: Layout) -> Grain:
    """Returns the grain of a pass over x. AMD's warps have twice the threads, each of which keeps 16 bytes."""
    found = GRAINS[name][layout.channels_last]
    return found._replace(per_thread=max(found.per_thread, 16)) if amd() else found


def _per_warp(layout: Layout, per_thread: int = 16) -> int:
    """Returns the elements of a warp; half as many if each needs its own address."""
    return 32 * per_thread if layout.align >= 8 else 16 * per_thread


def tile(layout: Layout, elements: int = TILE, inner_block: int = INNER_BLOCK, per_thread: int = 16) -> Tile:
    """Returns a tile that is long along the dense axis."""
    inner, outer = (layout.C, layout.HW) if layout.channels_last else (layout.HW, layout.C)
    block_outer = min(next_power_of_2(outer), elements // inner_block)
    block_inner = min(next_power_of_2(inner), elements // block_outer)
    block_outer = min(next_power_of_2(outer), elements // block_inner)
    num_warps = max(block_inner * block_outer // _per_warp(layout, per_thread), 1)
    blocks = (block_inner, block_outer) if layout.channels_last else (block_outer, block_inner)
    return Tile(layout.channels_last, layout.align, *blocks, num_warps)


def plane_tile(layout: Layout, limit: int) -> Tile | None:
    """Returns a tile that holds whole planes, so that one program reads them once; None if none fits.

    With the channels inside, a tile has at least 16 of them: 32 bytes of a 16-bit map, the least that memory moves.
    """
    block_p, channels = next_power_of_2(layout.HW), next_power_of_2(layout.C)
    least = min(channels, 16) if layout.channels_last else 1
    if block_p * least > limit:
        return None
    block_c = max(least, min(channels, TILE // block_p))
    num_warps = min(max(block_c * block_p // _per_warp(layout), 1), 16)
    return Tile(layout.channels_last, layout.align, block_c, block_p, num_warps)


def tiles(layout: Layout, t: Tile) -> int:
    """Returns how many tiles cover x."""
    return layout.N * cdiv(layout.C, t.BLOCK_C) * cdiv(layout.HW, t.BLOCK_P)


def split(programs: int, tiles: int, all_programs: int = PROGRAMS) -> tuple[int, int]:
    """Returns (splits, steps): the programs that share a reduction over `tiles` tiles, and the tiles of each.

    Args:
        programs: reductions of this length that run at once.
        all_programs: programs that keep the chip busy.
    """
    wanted = cdiv(all_programs, max(programs, 1))
    steps = min(max(cdiv(tiles, wanted), MIN_STEPS), tiles)
    return cdiv(tiles, steps), steps


def summed_steps(steps: int, tiles: int) -> int:
    """Returns `steps`, or fewer for a long sum. Its partials, which are added as a tree, stay below `PROGRAMS`."""
    return min(steps, max(MAX_STEPS, cdiv(tiles, PROGRAMS)))


class Reduction(NamedTuple):
    """How programs share a reduction: blocks along the kept axis, splits of `steps` tiles along the reduced one."""

    tile: Tile
    blocks: int
    splits: int
    steps: int


def reduction(
    layout: Layout,
    over_c: bool,
    elements: int = TILE,
    inner_block: int = INNER_BLOCK,
    per_thread: int = 16,
    programs: int = PROGRAMS,
) -> Reduction:
    """Returns the reduction over the channels of each pixel, or over the pixels of each channel."""
    t = tile(layout, elements, inner_block, per_thread)
    blocks_c, blocks_p = cdiv(layout.C, t.BLOCK_C), cdiv(layout.HW, t.BLOCK_P)
    kept, reduced = (blocks_p, blocks_c) if over_c else (blocks_c, blocks_p)
    steps = summed_steps(split(layout.N * kept, reduced, programs)[1], reduced)
    return Reduction(t, kept, cdiv(reduced, steps), steps)


def vector_block(length: int, limit: int = 256) -> int:
    """Returns the block of a one-dimensional axis of a small tensor."""
    return min(next_power_of_2(length), limit)


def linear_blocks(outputs: int, inputs: int) -> tuple[int, int]:
    """Returns (BLOCK_O, BLOCK_I) of a dense layer on small vectors: few steps along the inputs, many programs."""
    block_i = vector_block(inputs)
    return vector_block(outputs, min(1024 // block_i, 64)), block_i
