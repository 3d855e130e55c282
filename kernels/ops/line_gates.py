"""Gates of every row and column of a channel, from the means of all: launchers.

See `visattn_fast.ops.line_gates`. Products are few, and exact.
"""

from __future__ import annotations

import torch

from ..core.heuristics import PROGRAMS, cdiv, next_power_of_2, registers_for
from ..core.launch import device_guard, launch
from ..core.layout import contiguous
from ..passes.lines.gates import (
    Lines,
    _gates_kernel,
    _hidden_kernel,
    _line_hidden_grads_kernel,
    _line_weight_grads_kernel,
    _mean_grads_kernel,
    _norm_grads_kernel,
    _statistics_kernel,
    _weight_parts_kernel,
)

BLOCK_L = 16  # lines of a program: images are few, and each has hardly more than a hundred
WIDEST = 32  # channels, or hidden ones, that a program has at a time; products take 16 at least


def line_gates_fwd(
    means: torch.Tensor, height: int, w1: torch.Tensor, b1: torch.Tensor | None, bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None, mean: torch.Tensor | None, var: torch.Tensor | None, w_h: torch.Tensor,
    b_h: torch.Tensor | None, w_w: torch.Tensor, b_w: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(gates, z, mean, var). Reads means and writes gates once."""
    with device_guard(means):
        means, size, blocks = _lines(means, height, w1)
        N, L = means.shape[0], means.shape[2]
        programs, fixed = N * _line_blocks(size), mean is not None
        z = means.new_empty((N, L, size.M))
        new = means.new_empty if N and not fixed else means.new_zeros
        statistics = () if fixed else (new(size.M), new(size.M))
        parts = None if fixed else means.new_empty((programs, 2, size.M))
        of_m = cdiv(size.M, blocks["BLOCK_M"])
        w1, w_h, w_w = w1.contiguous(), w_h.contiguous(), w_w.contiguous()
        b1, b_h, b_w, *norm = map(contiguous, (b1, b_h, b_w, mean, var, bn_weight, bn_bias))
        launch(_hidden_kernel, programs, means, w1, b1, z, parts, size, **blocks, parts=of_m)
        if not fixed:
            launch(
                _statistics_kernel, of_m if N else 0, parts, *statistics, programs, N * L, size, BLOCK_L=BLOCK_L,
                **_part_blocks(means, programs, blocks),
            )  # fmt: skip
        gates = torch.empty_like(means)
        launch(
            _gates_kernel, programs, z, *(statistics or norm[:2]), *norm[2:], w_h, b_h, w_w, b_w, gates,
            size, EPS=eps, **blocks, parts=cdiv(size.C, blocks["BLOCK_C"]),
        )  # fmt: skip
        return gates, z, *(statistics or (means.new_empty(0), means.new_empty(0)))


def line_gates_bwd(
    dgates: torch.Tensor, gates: torch.Tensor, means: torch.Tensor, z: torch.Tensor, height: int, w1: torch.Tensor,
    bn_weight: torch.Tensor | None, bn_bias: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor,
    w_h: torch.Tensor, w_w: torch.Tensor, eps: float, fixed: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dmeans, sums [3, M], db_h, db_w, dw1, dw_h, dw_w), see `visattn_fast.ops.line_gates`."""
    with device_guard(means):
        means, size, blocks = _lines(means, height, w1)
        dgates, gates = (_like(t, means) for t in (dgates, gates))
        (N, C, L), M = means.shape, size.M
        programs, count = N * _line_blocks(size), N * L
        of_m, of_c = cdiv(M, blocks["BLOCK_M"]), cdiv(C, blocks["BLOCK_C"])
        new = means.new_empty if N else means.new_zeros
        sums, of_norm = new((3, M)), [*map(contiguous, (mean, var, bn_weight, bn_bias))]
        daffine, parts = torch.empty_like(z), means.new_empty((programs, 2, M))
        launch(
            _line_hidden_grads_kernel, programs, dgates, gates, z, *of_norm, w_h.contiguous(), w_w.contiguous(),
            daffine, parts, size, EPS=eps, **blocks, parts=of_m,
        )  # fmt: skip
        launch(
            _norm_grads_kernel, of_m if N else 0, parts, *of_norm[1:3], sums, programs, size, EPS=eps, FIXED=fixed,
            **_part_blocks(means, programs, blocks),
        )  # fmt: skip
        dmeans, of_z = torch.empty_like(means), (daffine, z, *of_norm, sums)
        launch(
            _mean_grads_kernel, programs, *of_z, w1.contiguous(), dmeans, count, size, EPS=eps, FIXED=fixed, **blocks,
            **registers_for(means, 4), parts=of_c,
        )  # fmt: skip

        dw1, dw_h, dw_w = (new(w.shape, dtype=w.dtype) for w in (w1, w_h, w_w))
        db_h, db_w = new(C), new(C)
        # Partial sums are to move less than the lines do.
        length, splits = 3 * C * M + 2 * C, max(min(cdiv(PROGRAMS, of_c * of_m), N * L // (4 * M)), 1)
        parts = means.new_empty((splits, length))
        launch(
            _weight_parts_kernel, of_c * of_m if N else 0, dgates, gates, means, *of_z, parts, N, count, size,
            EPS=eps, FIXED=fixed, **blocks, parts=splits,
        )  # fmt: skip
        launch(
            _line_weight_grads_kernel, cdiv(length, 256) if N else 0, parts, dw_h, dw_w, dw1, db_h, db_w, splits, size,
            BLOCK=256,
        )  # fmt: skip
        return dmeans, sums, db_h, db_w, dw1, dw_h, dw_w


def _lines(means: torch.Tensor, height: int, w1: torch.Tensor) -> tuple[torch.Tensor, Lines, dict[str, int]]:
    """Dense lines, their sizes, and the blocks of both products."""
    _, C, L = means.shape
    dense = means.is_contiguous() or means.mT.is_contiguous()
    means, M = means if dense else means.contiguous(), w1.shape[0]
    block_c, block_m = (min(max(next_power_of_2(k), 16), WIDEST) for k in (C, M))
    blocks = {"BLOCK_L": BLOCK_L, "BLOCK_C": block_c, "BLOCK_M": block_m}
    return means, Lines(C, height, L - height, M, *means.stride()[1:]), blocks


def _like(t: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    return t if t.stride() == means.stride() else torch.empty_like(means).copy_(t)


def _line_blocks(size: Lines) -> int:
    """Of an image."""
    return int(cdiv(size.H, BLOCK_L) + cdiv(size.W, BLOCK_L))


def _part_blocks(means: torch.Tensor, programs: int, blocks: dict[str, int]) -> dict[str, int]:
    """For what adds up the programs' parts."""
    block_m = blocks["BLOCK_M"]
    return {"BLOCK_S": min(next_power_of_2(programs), 2048 // block_m), "BLOCK_M": block_m, **registers_for(means, 4)}
