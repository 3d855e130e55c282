"""Teams of programs that keep an image on the chip between pooling and scaling, so that x is read once.

The programs of a team share an image. Each keeps a tile of it in registers, publishes its share of the sums, waits
until the whole team has published, and goes on with the totals. They publish and wait in global memory, which the L2
cache holds, so it is the same on every chip. Clusters (``num_ctas``) would be closer, but cannot exchange sums before
Triton 3.8.

Programs join teams in the order in which they start. So all programs that joined before a waiting one are running, and
its team is complete as soon as there is room for it (`team_of`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, activate, activation_grad, gate_grad
from ..core.heuristics import Tile, cdiv, next_power_of_2, tile
from ..core.layout import Layout
from ..core.tiles import dense_offsets, load_channels, tile_mask, x_offsets

RESIDENT_TILE = 16384  # elements that a program keeps: 64 a thread, which leaves registers for a second program


class Team(NamedTuple):
    """The programs that share an image, `blocks_c` times `blocks_p`; each keeps one tile."""

    tile: Tile
    blocks_c: int
    blocks_p: int

    @property
    def size(self) -> int:
        return self.blocks_c * self.blocks_p

    @property
    def block_s(self) -> int:
        """The block of a sum over the team's blocks of pixels."""
        return next_power_of_2(self.blocks_p)


def fitting_team(layout: Layout, itemsize: int, multiprocessors: int) -> Team | None:
    """Returns the team that keeps an image on the chip; None if the image is too large.

    Its programs wait for each other, so all of them must run at once: a multiprocessor takes one of them at least. A
    tile is long along the pixels, so the team exchanges few sums; but 64 channels inside are read as 128 bytes.
    """
    wide = layout.align >= 8  # otherwise a thread keeps fewer elements, because it needs an address for each
    elements = RESIDENT_TILE // (1 if wide else 2) * 4 // max(itemsize, 4)
    t = tile(layout, elements, 64 if layout.channels_last else 512)
    t = t._replace(BLOCK_C=min(t.BLOCK_C, 128), num_warps=8 if wide else 16)
    team = Team(t, cdiv(layout.C, t.BLOCK_C), cdiv(layout.HW, t.BLOCK_P))
    return team if team.size <= multiprocessors else None


def team_of(x: torch.Tensor, layout: Layout) -> Team | None:
    """Returns the team for an image of x; None if x is empty or too large."""
    return fitting_team(layout, x.element_size(), multiprocessors(x.device)) if layout.N else None


def multiprocessors(device: torch.device) -> int:
    """Returns the number of SMs; 108, an A100's, if the device is not CUDA."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def exchange(layout: Layout, team: Team, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocates the sums that a team exchanges, [N, blocks_p, C] like ``like``, and zeros to meet at."""
    sums = like.new_empty((layout.N, team.blocks_p, layout.C))
    return sums, like.new_zeros(1 + layout.N, dtype=torch.int32)


@triton.jit
def join_team(meet_ptr, size, TILE: tl.constexpr):
    """Returns this program's image (int64), number in the team, block of pixels, channels and pixels."""
    blocks_p = tl.cdiv(size.HW, TILE.BLOCK_P)
    team = tl.cdiv(size.C, TILE.BLOCK_C) * blocks_p
    ticket = tl.atomic_add(meet_ptr, 1, sem="relaxed")
    member = ticket % team
    block_p = member % blocks_p
    c = member // blocks_p * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    return (ticket // team).to(tl.int64), member, block_p, c, block_p * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)


@triton.jit
def meet(meet_ptr, n, team):
    """Waits until the whole team has come here; what it stored before can be loaded afterwards."""
    tl.debug_barrier()  # the arrival, which one thread makes, comes after the stores of all
    tl.atomic_add(meet_ptr + 1 + n, 1, sem="release")
    while tl.atomic_add(meet_ptr + 1 + n, 0, sem="acquire") < team:
        pass
    tl.debug_barrier()


@triton.jit
def total(published_ptr, k, mask, stride, count, BLOCK_S: tl.constexpr):
    """Returns the sum, in a fixed order, of what ``count`` programs stored at published + k, ``stride`` apart."""
    s = tl.arange(0, BLOCK_S)
    offsets = s[:, None].to(tl.int64) * stride + k[None, :]
    inside = (s < count)[:, None] & mask[None, :]
    return tl.sum(tl.load(published_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg"), 0)


@triton.jit
def store_scaled(x, gate, residual_ptr, y_ptr, offsets, mask, ACTIVATION: tl.constexpr):
    """Stores y = act(x * gate + residual)."""
    v = x.to(gate.dtype) * gate[:, None]
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(gate.dtype)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


class Upstream(NamedTuple):
    """The tensors that g' = grad * act'(z) is made of, and dresidual, which stores it, as kernels take them."""

    grad: Any
    x: Any
    residual: Any
    gate: Any
    dresidual: Any


@triton.jit
def publish_gate_grad(
    upstream,
    sums_ptr,
    meet_ptr,
    size,
    GATE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Joins a team, stores g' of the tile, and publishes its share of dz, the gradient before the gate's activation.

    Returns the image, the member, its block of pixels, channels, offsets in dx, mask, g', gate, and its share of dz.
    """
    n, member, block_p, c, p = join_team(meet_ptr, size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    gate = load_channels(upstream.gate, n, c, size)
    g = tl.load(upstream.grad + offsets, mask=mask, other=0.0)
    x = tl.load(upstream.x + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(gate.dtype)
    v = g.to(gate.dtype)
    if ACTIVATION != NONE:
        z = x * gate[:, None]
        if upstream.residual is not None:
            z += tl.load(upstream.residual + offsets, mask=mask, other=0.0).to(gate.dtype)
        v = activation_grad(v, z, ACTIVATION)
        g = v.to(g.dtype)
        tl.store(upstream.dresidual + offsets, g, mask=mask)
    dz = tl.sum(v * x, 1) * gate_grad(gate, GATE_ACTIVATION)
    tl.store(sums_ptr + (n * tl.cdiv(size.HW, TILE.BLOCK_P) + block_p) * size.C + c, dz, mask=c < size.C)
    return n, member, block_p, c, offsets, mask, g, gate, dz
