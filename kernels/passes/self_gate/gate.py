"""Gates that each element computes from itself and its channel, such as SimAM; and the tiles of their passes.

y = act(x * sigmoid((q d + a) d + b) + residual), d = x - m. Each KIND derives m, q, a and b from two statistics of a
channel, its mean and a scale, and from weights. If whole planes fit in a tile, a program reads them once and does all
(`planes.py`). Otherwise the passes stream (`moments.py`, `streams.py`): moments, gate; backward sums, dx. Streaming
passes take statistics [N, C] of each image or [C] of the batch; with the latter a gate may scale another map, z,
instead of x.

Shuffled kinds exchange channels behind the gate: channel h C / 2 + j of x becomes channel 2 j + h of y. Their tiles are
in the order of y; with the channels inside, the two halves of x are read side by side, so accesses stay wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...core import heuristics
from ...core.heuristics import INNER_BLOCK, PLANE_TILE, PROGRAMS, Reduction, Tile, plane_tile, reduction
from ...core.layout import Layout
from .tiles import SHUFFLE


class Gate(NamedTuple):
    """A module's KIND, its weights (`ShuffleWeights`, `Line` or None), and eps."""

    kind: Any
    weights: Any = None
    eps: float = 0.0

    @property
    def width(self) -> int:
        """Elements of the first weight, which kernels take as K."""
        return 1 if self.weights is None else self.weights[0].numel()

    def exchanges(self, layout: Layout) -> bool:
        """True if tiles of x are made of two halves."""
        return self.kind == SHUFFLE and layout.channels_last


def halved(t: Tile) -> Tile:
    return t._replace(num_warps=max(t.num_warps // 2, 1))


def gate_tile(t: Tile, layout: Layout, gate: Gate) -> Tile:
    """Returns t with half as many threads: each serves more elements of a channel, and a half of a tile is 16 bytes."""
    # AMD's warps have twice the threads, so half the instructions per element already.
    return halved(t) if gate.exchanges(layout) or (layout.align >= 8 and not heuristics.amd()) else t


def gate_plane_tile(layout: Layout, gate: Gate, backward: bool = False) -> Tile | None:
    """Returns a tile of whole planes, or None if they are too large."""
    # Backward keeps x and grad in registers. Halves of a shuffled tile meet in shared memory, and not every chip has
    # enough of it for the largest tiles.
    exchanges = gate.exchanges(layout)
    t = plane_tile(layout, PLANE_TILE // 2 if backward or exchanges else PLANE_TILE)
    if t is None or (backward and exchanges and not heuristics.amd()):
        return t  # x in its two orders, and grad: with twice as much per thread there would be too few registers
    return gate_tile(t, layout, gate)


def gate_reduction(layout: Layout, channels: int = 64, programs: int = PROGRAMS, per_thread: int = 16) -> Reduction:
    """Returns the reduction over pixels, with tiles of so many channels in channels_last."""
    # If all lanes of a warp were along the channels, the sums of its warps would meet in one bank of shared memory.
    inner_block = channels if layout.channels_last else INNER_BLOCK
    return reduction(layout, over_c=False, inner_block=inner_block, per_thread=per_thread, programs=programs)
