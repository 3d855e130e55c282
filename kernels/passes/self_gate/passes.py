"""Gates that each element computes of itself and of its channel: SimAM and its like.

y = act(x * sigmoid((q d + a) d + b) + residual), d = x - m. Each KIND derives m, q, a, b from two statistics of a
channel, its mean and a scale, and from parameters. Where whole planes fit in a tile, a program reads them once and does
all; else the passes stream: moments, gate; backward sums, dx. Those take statistics [N, C] of each image, or [C] of the
batch; a gate with the latter may scale another map, z, instead of x.

Shuffled kinds exchange channels behind the gate: channel h C / 2 + j of x becomes channel 2 j + h of y. Their tiles are
in the order of y; with the channels inside, the two halves of x are read side by side, so that accesses stay wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import heuristics
from ...core.heuristics import (
    INNER_BLOCK,
    PLANE_TILE,
    PROGRAMS,
    SCALE_TILE,
    TILE,
    Reduction,
    Tile,
    cdiv,
    next_power_of_2,
    plane_tile,
    reduction,
    tile,
    tiles,
    vector_block,
)
from ...core.launch import launch
from ...core.layout import Layout, accumulation_dtype
from ...passes.pool import combine
from .kernels import (
    _combine_moments_kernel,
    _gate_kernel,
    _moments_kernel,
    _plane_bwd_kernel,
    _plane_fwd_kernel,
    _self_gate_dx_kernel,
    _sums_kernel,
)
from .tiles import SHUFFLE


class Gate(NamedTuple):
    """What a module brings: its KIND, up to six parameters, and eps."""

    kind: Any
    parameters: tuple[torch.Tensor | None, ...] = (None,) * 6
    eps: float = 0.0

    @property
    def width(self) -> int:
        """The K that kernels know: elements of the first parameter."""
        return 1 if self.parameters[0] is None else self.parameters[0].numel()


def _exchanges(layout: Layout, gate: Gate) -> bool:
    """Whether tiles of x are made of two halves."""
    return gate.kind == SHUFFLE and layout.channels_last


def _halved(t: Tile) -> Tile:
    return t._replace(num_warps=max(t.num_warps // 2, 1))


def _tile(t: Tile, layout: Layout, gate: Gate) -> Tile:
    """Half as many threads: what each computes of a channel serves more elements, and a half of a tile is 16 bytes."""
    # AMD's warps have twice the threads, and half the instructions per element of them.
    return _halved(t) if _exchanges(layout, gate) or (layout.align >= 8 and not heuristics.amd()) else t


def _plane_tile(layout: Layout, gate: Gate, backward: bool = False) -> Tile | None:
    # Backward keeps x and grad in registers. Halves of a shuffled tile meet in shared memory, of which not every chip
    # has enough for the largest tiles.
    exchanges = _exchanges(layout, gate)
    t = plane_tile(layout, PLANE_TILE // 2 if backward or exchanges else PLANE_TILE)
    if t is None or (backward and exchanges and not heuristics.amd()):
        return t  # x in its two orders, and grad: twice as much a thread would be more registers than there are
    return _tile(t, layout, gate)


def _reduction(layout: Layout, channels: int = 64, programs: int = PROGRAMS, a_thread: int = 16) -> Reduction:
    # Were all lanes of a warp along the channels, the sums of its warps would meet in one bank of shared memory.
    inner_block = channels if layout.channels_last else INNER_BLOCK
    return reduction(layout, over_c=False, inner_block=inner_block, a_thread=a_thread, programs=programs)


def _stats_n(mean: torch.Tensor, layout: Layout) -> int:
    """How far statistics of one image lie from those of the next one: the batch's are the same for all."""
    return layout.C if mean.dim() == 2 else 0


def self_gate(
    x: torch.Tensor, layout: Layout, gate: Gate, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, and of each channel the mean and the scale [N, C]. Reads x once if planes fit in a tile, else twice."""
    t = _plane_tile(layout, gate)
    mean = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
    scale = torch.empty_like(mean)
    if t is None:
        values, span = moments(x, layout)
        parts, block = values.shape[1], vector_block(layout.C, 16)
        launch(
            _combine_moments_kernel, layout.N * cdiv(layout.C, block),
            values, mean, scale, layout.C, layout.HW, parts, span,
            EPS=gate.eps, KIND=gate.kind.value, BLOCK_S=min(next_power_of_2(parts), TILE // 2 // block), BLOCK_L=block,
        )  # fmt: skip
        return apply_gate(x, layout, gate, mean, scale, residual, activation), mean, scale
    y = layout.empty(x)
    launch(
        _plane_fwd_kernel, tiles(layout, t),
        x, None if residual is None else layout.dense(residual), y, mean, scale, *gate.parameters,
        layout.C, layout.HW, gate.width, layout.stride_n, layout.stride_o, EPS=gate.eps, KIND=gate.kind.value,
        ACTIVATION=activation, **t._asdict(),
    )  # fmt: skip
    return y, mean, scale


def moments(x: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, int]:
    """Mean and second moment [N, parts, 2, C] of parts of the pixels, and how many each has. Reads x once."""
    t, blocks, parts, steps = _reduction(layout)
    values = x.new_empty((layout.N, parts, 2, layout.C), dtype=accumulation_dtype(x))
    launch(
        _moments_kernel, layout.N * blocks, x, values, layout.C, layout.HW, layout.stride_n, layout.stride_o, steps,
        **t._asdict(), parts=parts,
    )  # fmt: skip
    return values, steps * t.BLOCK_P


def apply_gate(
    x: torch.Tensor, layout: Layout, gate: Gate, mean: torch.Tensor, scale: torch.Tensor,
    residual: torch.Tensor | None, activation: int, z: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """y from the statistics. Reads x once; z, which may be scaled instead, is dense as y is."""
    y = layout.empty(x)
    t = _tile(tile(layout, SCALE_TILE), layout, gate)
    launch(
        _gate_kernel, tiles(layout, t),
        x, z, None if residual is None else layout.dense(residual), y, mean, scale, *gate.parameters,
        layout.C, layout.HW, gate.width, layout.stride_n, layout.stride_o, _stats_n(mean, layout),
        KIND=gate.kind.value, ACTIVATION=activation, **t._asdict(),
    )  # fmt: skip
    return y


def self_gate_bwd(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, gate: Gate, mean: torch.Tensor, scale: torch.Tensor,
    residual: torch.Tensor | None, activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dresidual, sums): sums [N, 2, C] are of r and r d in the order of y; SimAM, without weights, needs none.

    Reads x and grad once if planes fit in a tile, else twice. With an activation, g' is written once more and returned
    as dresidual (else empty: it is grad), and a residual is read once.
    """
    N, C, HW = layout.N, layout.C, layout.HW
    dx, sums = layout.empty(x), mean.new_empty((N, 2, C))
    t = _plane_tile(layout, gate, backward=True)
    if t is None:
        g, dresidual, parts = logit_sums(grad, x, layout, gate, mean, scale, residual, activation)
        combine(parts.flatten(2), None, sums)
        gate_dx(g, x, layout, gate, mean, scale, sums, dx)
        return dx, dresidual, sums
    dresidual = layout.empty(x) if activation else x.new_empty(0)
    launch(
        _plane_bwd_kernel, tiles(layout, t),
        layout.dense(grad), x, layout.dense(residual) if activation and residual is not None else None,
        mean, scale, *gate.parameters, dx, dresidual, sums, C, HW, gate.width, layout.stride_n, layout.stride_o,
        KIND=gate.kind.value, ACTIVATION=activation, **t._asdict(),
    )  # fmt: skip
    return dx, dresidual, sums


def logit_sums(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, gate: Gate, mean: torch.Tensor, scale: torch.Tensor,
    residual: torch.Tensor | None, activation: int, z: torch.Tensor | None = None, dx: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(g', dresidual, parts [N, parts, 2, C] of the sums of r and r d). Reads x, grad and z once.

    Writes dx, and dz, where given: if the statistics do not depend on x, that is all of the backward pass.
    """
    C, HW = layout.C, layout.HW
    grad = layout.dense(grad)
    dresidual = layout.empty(x) if activation else x.new_empty(0)
    # Registers let a chip run less than PROGRAMS at once: of more programs, the last ones are a smaller share.
    exchanges = _exchanges(layout, gate)
    channels = 256 // x.element_size() if exchanges else 64  # 128 bytes of each half
    # With 16 elements a thread some variants spill, by a little: ptxas would rather have more warps at once.
    a_thread = 16 if layout.channels_last or heuristics.amd() else 8
    t, blocks, parts, steps = _reduction(layout, channels, 4 * PROGRAMS, a_thread)
    if exchanges and heuristics.amd():
        t = _halved(t)
    sums = mean.new_empty((layout.N, parts, 2, C))
    launch(
        _sums_kernel, layout.N * blocks,
        grad, x, z, layout.dense(residual) if activation and residual is not None else None, mean, scale,
        *gate.parameters, dresidual, dx, dz, sums,
        C, HW, gate.width, layout.stride_n, layout.stride_o, _stats_n(mean, layout), steps,
        KIND=gate.kind.value, ACTIVATION=activation, **t._asdict(), parts=parts,
        **heuristics.registers_for(x, t.num_warps),
    )  # fmt: skip
    return dresidual if activation else grad, dresidual, sums


def gate_dx(
    g: torch.Tensor, x: torch.Tensor, layout: Layout, gate: Gate, mean: torch.Tensor, scale: torch.Tensor,
    sums: torch.Tensor, dx: torch.Tensor, z: torch.Tensor | None = None, dz: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Writes dx, and dz if there is a z, from g' and the sums [N, 2, C] or [2, C]. Reads g', x and z once."""
    t = _tile(tile(layout, SCALE_TILE), layout, gate)
    stats_n = _stats_n(mean, layout)
    launch(
        _self_gate_dx_kernel, tiles(layout, t),
        g, x, z, mean, scale, sums, *gate.parameters, dx, dz,
        layout.C, layout.HW, gate.width, layout.stride_n, layout.stride_o, stats_n,
        layout.HW if stats_n else layout.N * layout.HW, KIND=gate.kind.value, **t._asdict(),
    )  # fmt: skip
