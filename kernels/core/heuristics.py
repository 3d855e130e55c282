"""Launch parameters as plain functions of sizes and layout: launchers and compile-time tests call the same ones.

There is no autotuning: the first call of a shape costs one compilation, and the order of a sum never depends on timing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import Layout

INNER_BLOCK = 256  # elements along the dense axis: a warp reads 512 bytes of bfloat16 in 16-byte loads
PROGRAMS = 1024  # about eight per streaming multiprocessor of the largest chips
MIN_STEPS = 4  # tiles that are worth a partial result and its part of a second launch
TILE = 2048  # elements of a tile that accumulates
SCALE_TILE = 4096  # elements of a tile that is read and written once
PLANE_TILE = 16384  # elements of a tile of whole planes, kept in registers between two uses

# Whether SE and ECA keep an image in the registers of the programs that share it, where `resident` finds a way.
# Streaming serves until a GPU shows this to be faster: an H200 did not. Read at each call: tools and tests set it.
RESIDENT = False
RESIDENT_TILE = 16384  # elements that a program keeps: 64 a thread, which leaves registers for a second program


# triton.cdiv and triton.next_power_of_2 are made to be called from kernels, too, and cost microseconds here.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def amd() -> bool:
    """Whether the kernels are for AMD's chips, whose warps are of 64 threads instead of 32."""
    return torch.version.hip is not None


def registers_for(x: torch.Tensor, warps: int) -> dict[str, int]:
    """An option: a thread may have as many of the 65536 registers as leaves room for so many warps at once.

    NVIDIA's assembler spills a few by its own choice, so that there is room for one more program, unless it is told to.
    """
    return {} if amd() or x.is_xpu else {"maxnreg": min(65536 // 32 // warps, 255)}


class Tile(NamedTuple):
    """A `[BLOCK_C, BLOCK_P]` tile of one image; `_asdict()` is what a kernel over x takes as keywords."""

    CHANNELS_LAST: bool
    ALIGN: int
    BLOCK_C: int
    BLOCK_P: int
    num_warps: int


class Grain(NamedTuple):
    """How large a tile is: in all, along the dense axis, and for a thread, whose loads are under way together."""

    elements: int = TILE
    inner_block: int = INNER_BLOCK
    a_thread: int = 16


# The passes over x, in nchw and in channels_last: the fastest grains of 22 each that an H200 was given, with
# [64, 256, 56, 56] in bfloat16, of which a copy takes 53 us. Behind each, us with the usual grain and with this one.
GRAINS = {
    "mean": (Grain(a_thread=32), Grain()),  # 45 -> 39; 47
    "mean and maximum": (Grain(a_thread=8), Grain(1024, a_thread=32)),  # 60 -> 51; 106 -> 62
    "maps": (Grain(inner_block=128), Grain(a_thread=32)),  # mean and maximum over the channels: 126 -> 93; 73 -> 68
    "scale": (Grain(SCALE_TILE), Grain()),  # 54; 56 -> 54
    "gate gradient": (Grain(), Grain(inner_block=128)),  # 61; 68 -> 63
    "gate gradients": (Grain(1024, a_thread=32), Grain(1024, a_thread=8)),  # of both gates: 77 -> 66; 98 -> 76
    "map gradients": (Grain(SCALE_TILE), Grain()),  # 51; 53 -> 46
    "input gradient": (Grain(SCALE_TILE), Grain()),  # 54; 55 -> 53
    "input gradient, maps": (Grain(SCALE_TILE, 128), Grain(SCALE_TILE, a_thread=32)),  # 86 -> 70; 86 -> 72
}


def grain(name: str, layout: Layout) -> Grain:
    """That of a pass over x. AMD's warps have twice the threads, which keep 16 bytes each."""
    found = GRAINS[name][layout.channels_last]
    return found._replace(a_thread=max(found.a_thread, 16)) if amd() else found


def _per_warp(layout: Layout, a_thread: int = 16) -> int:
    """Elements of a tile; half as many a thread where each needs its own address."""
    return 32 * a_thread if layout.align >= 8 else 16 * a_thread


def tile(layout: Layout, elements: int = TILE, inner_block: int = INNER_BLOCK, a_thread: int = 16) -> Tile:
    """Long along the dense axis."""
    inner, outer = (layout.C, layout.HW) if layout.channels_last else (layout.HW, layout.C)
    block_outer = min(next_power_of_2(outer), elements // inner_block)
    block_inner = min(next_power_of_2(inner), elements // block_outer)
    block_outer = min(next_power_of_2(outer), elements // block_inner)
    num_warps = max(block_inner * block_outer // _per_warp(layout, a_thread), 1)
    blocks = (block_inner, block_outer) if layout.channels_last else (block_outer, block_inner)
    return Tile(layout.channels_last, layout.align, *blocks, num_warps)


def plane_tile(layout: Layout, limit: int) -> Tile | None:
    """A tile that holds whole planes, so that one program reads them once and does all; None where none fits.

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
    """How many tiles cover x."""
    return layout.N * cdiv(layout.C, t.BLOCK_C) * cdiv(layout.HW, t.BLOCK_P)


def splits(programs: int, tiles: int, all_programs: int = PROGRAMS) -> tuple[int, int]:
    """(parts, steps): how many programs share a reduction over `tiles` tiles, and how many tiles each one takes."""
    wanted = cdiv(all_programs, max(programs, 1))
    steps = min(max(cdiv(tiles, wanted), MIN_STEPS), tiles)
    return cdiv(tiles, steps), steps


class Reduction(NamedTuple):
    """How programs share a reduction: blocks along the kept axis, parts of `steps` tiles along the reduced one."""

    tile: Tile
    blocks: int
    parts: int
    steps: int


def reduction(
    layout: Layout, over_c: bool, elements: int = TILE, inner_block: int = INNER_BLOCK, a_thread: int = 16,
    programs: int = PROGRAMS,
) -> Reduction:  # fmt: skip
    """Over the channels of each pixel, or over the pixels of each channel."""
    t = tile(layout, elements, inner_block, a_thread)
    blocks_c, blocks_p = cdiv(layout.C, t.BLOCK_C), cdiv(layout.HW, t.BLOCK_P)
    kept, reduced = (blocks_p, blocks_c) if over_c else (blocks_c, blocks_p)
    return Reduction(t, kept, *splits(layout.N * kept, reduced, programs))


class Team(NamedTuple):
    """The programs that share an image: `blocks_c` times `blocks_p` tiles, of which each keeps one."""

    tile: Tile
    blocks_c: int
    blocks_p: int

    @property
    def size(self) -> int:
        return self.blocks_c * self.blocks_p


def resident(layout: Layout, itemsize: int, multiprocessors: int) -> Team | None:
    """How programs keep an image on the chip between pooling and scaling; None where it is too large for that.

    They wait for each other, so all of a team must run at once: a multiprocessor takes one of them at least. A tile is
    long along the pixels, which makes sums that the team exchanges few, but 64 channels inside are read as 128 bytes.
    """
    wide = layout.align >= 8  # else a thread keeps fewer elements: it needs an address for each
    elements = RESIDENT_TILE // (1 if wide else 2) * 4 // max(itemsize, 4)
    t = tile(layout, elements, 64 if layout.channels_last else 512)
    t = t._replace(BLOCK_C=min(t.BLOCK_C, 128), num_warps=8 if wide else 16)
    team = Team(t, cdiv(layout.C, t.BLOCK_C), cdiv(layout.HW, t.BLOCK_P))
    return team if team.size <= multiprocessors else None


def vector_block(length: int, limit: int = 256) -> int:
    """Block of a one-dimensional axis of a small tensor."""
    return min(next_power_of_2(length), limit)


def linear_blocks(outputs: int, inputs: int) -> tuple[int, int]:
    """(BLOCK_O, BLOCK_I) of a dense layer on small vectors: few steps along the inputs, many programs."""
    block_i = vector_block(inputs)
    return vector_block(outputs, min(1024 // block_i, 64)), block_i
