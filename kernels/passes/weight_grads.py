"""Gradients of a gate's weights, from small tensors: work that a few programs do beside a pass over x.

Each sum is in the accumulation dtype and in a fixed order, and is rounded once, to the dtype of its weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import RELU, activate
from ..core.heuristics import cdiv, vector_block
from ..core.tiles import bound_if
from .partials import add_compensated


class MLPOperands(NamedTuple):
    """The operands of an MLP's weight gradients, and their results, as kernels take them. BRANCHES may be left out."""

    dz: Any  # [N, C], the gradient before the gate's activation
    hidden: Any  # [N, BRANCHES, R], as forward saved it
    dhidden: Any  # like hidden, the gradient before the hidden activation
    pooled: Any  # [N, BRANCHES, C]
    dw1: Any  # [R, C]
    db1: Any  # [R], or None
    dw2: Any  # [C, R]
    db2: Any  # [C], or None
    C: Any
    R: Any


class MLPTile(NamedTuple):
    """The tile of both weights that a program makes, `[BLOCK_C, BLOCK_R]`; kernels take it as ``MLP``."""

    BRANCHES: int
    HIDDEN_ACTIVATION: int
    BLOCK_C: int
    BLOCK_R: int


@triton.jit
def mlp_grads(program, mlp, N, MLP: tl.constexpr, UNROLL: tl.constexpr):
    """dw2 [C, R] = sum_n dz act(hidden)^T, dw1 [R, C] = sum_n dhidden pooled^T, and biases; one tile, n in order."""
    BLOCK_C: tl.constexpr = MLP.BLOCK_C
    BLOCK_R: tl.constexpr = MLP.BLOCK_R
    BRANCHES: tl.constexpr = MLP.BRANCHES
    C, R = mlp.C, mlp.R
    acc_ty = mlp.dz.dtype.element_ty
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r = program // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R)
    dw1 = tl.zeros([BLOCK_C, BLOCK_R], acc_ty)
    dw2 = tl.zeros([BLOCK_C, BLOCK_R], acc_ty)
    db1 = tl.zeros([BLOCK_R], acc_ty)
    db2 = tl.zeros([BLOCK_C], acc_ty)
    for n in tl.range(0, N, loop_unroll_factor=UNROLL):
        dz = tl.load(mlp.dz + tl.cast(n, tl.int64) * C + c, mask=c < C, other=0.0)
        db2 += dz
        for branch in tl.static_range(BRANCHES):
            row = tl.cast(n, tl.int64) * BRANCHES + branch
            h = activate(tl.load(mlp.hidden + row * R + r, mask=r < R, other=0.0), MLP.HIDDEN_ACTIVATION)
            dh = tl.load(mlp.dhidden + row * R + r, mask=r < R, other=0.0)
            v = tl.load(mlp.pooled + row * C + c, mask=c < C, other=0.0)
            dw1 += v[:, None] * dh[None, :]
            dw2 += dz[:, None] * h[None, :]
            db1 += dh
    mask = (c < C)[:, None] & (r < R)[None, :]
    tl.store(mlp.dw1 + r[None, :].to(tl.int64) * C + c[:, None], dw1, mask=mask)
    tl.store(mlp.dw2 + c[:, None].to(tl.int64) * R + r[None, :], dw2, mask=mask)
    if mlp.db1 is not None:
        tl.store(mlp.db1 + r, db1, mask=r < bound_if(program % blocks_c == 0, R))
    if mlp.db2 is not None:
        tl.store(mlp.db2 + c, db2, mask=c < bound_if(program // blocks_c == 0, C))


@triton.jit
def mlp_grads_first(program, mlp, N, MLP: tl.constexpr):
    """Does this program's share of the MLP's weight gradients.

    Returns the program's index in the rest of the launch, or a negative number if it had such a share.
    """
    programs = tl.cdiv(mlp.C, MLP.BLOCK_C) * tl.cdiv(mlp.R, MLP.BLOCK_R)
    if program < programs:
        mlp_grads(program, mlp, N, MLP, 2)
    return program - programs


class MLPGrads(NamedTuple):
    """The gradients of an MLP's weights, which a pass over x is still to write."""

    operands: MLPOperands
    hidden_activation: int

    @property
    def images(self) -> int:
        return self.operands.dz.shape[0]

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """The gradients of the weights and biases in turn, or of the weights alone."""
        o = self.operands
        return tuple(d for d in (o.dw1, o.db1, o.dw2, o.db2) if d is not None)

    def tile(self, block_c: int = 16) -> MLPTile:
        """Returns a small tile: more registers a thread would leave fewer programs for the pass beside."""
        o = self.operands
        branches = o.pooled.shape[1] if o.pooled.dim() == 3 else 1
        return MLPTile(branches, self.hidden_activation, vector_block(o.C, block_c), vector_block(o.R, 16))

    def programs(self, tile: MLPTile) -> int:
        return cdiv(self.operands.C, tile.BLOCK_C) * cdiv(self.operands.R, tile.BLOCK_R) if self.images else 0


def empty_mlp_grads(
    dz: torch.Tensor,
    dhidden: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    pooled: torch.Tensor,
    hidden: torch.Tensor,
    hidden_activation: int = RELU.value,
    biases: bool = True,
) -> MLPGrads:
    """Allocates the gradients, each in its weight's dtype; zeros for an empty batch."""
    (N, C), R = dz.shape, w1.shape[0]
    new = dz.new_empty if N else dz.new_zeros
    db1, db2 = (new(R, dtype=w1.dtype), new(C, dtype=w2.dtype)) if biases else (None, None)
    dw1, dw2 = new(w1.shape, dtype=w1.dtype), new(w2.shape, dtype=w2.dtype)
    return MLPGrads(MLPOperands(dz, hidden, dhidden, pooled, dw1, db1, dw2, db2, C, R), hidden_activation)


class RowSumOperands(NamedTuple):
    """out [L] = sum over the rows of partials [rows, L], as kernels take it."""

    partials: Any
    out: Any
    L: Any


class RowSumTile(NamedTuple):
    """The columns of a program, BLOCK_L, and the rows that it adds at once, BLOCK_S."""

    BLOCK_S: int
    BLOCK_L: int


@triton.jit
def sum_rows(program, operands, rows, SUM: tl.constexpr):
    """Sums the rows of one block of columns in a fixed order."""
    BLOCK_S: tl.constexpr = SUM.BLOCK_S
    BLOCK_L: tl.constexpr = SUM.BLOCK_L
    L = operands.L
    s, k = tl.arange(0, BLOCK_S), program * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_S, BLOCK_L], operands.partials.dtype.element_ty)
    lost = tl.zeros([BLOCK_S, BLOCK_L], total.dtype)
    for start in tl.range(0, rows, BLOCK_S, loop_unroll_factor=4):
        row = start + s[:, None]
        mask = (row < rows) & (k < L)[None, :]
        v = tl.load(operands.partials + row.to(tl.int64) * L + k[None, :], mask=mask, other=0.0)
        total, lost = add_compensated(total, lost, v)
    tl.store(operands.out + k, tl.sum(total, 0), mask=k < L)


@triton.jit
def row_sum_first(program, operands, rows, SUM: tl.constexpr):
    """Does this program's share of a sum over rows, if there is a sum; returns an index as `mlp_grads_first` does."""
    if operands is not None:
        programs = tl.cdiv(operands.L, SUM.BLOCK_L)
        if (program >= 0) & (program < programs):
            sum_rows(program, operands, rows, SUM)
        program -= programs
    return program


class RowSum(NamedTuple):
    """out [L] = sum over the rows of partials [rows, L], which a pass over x is still to write."""

    partials: torch.Tensor
    out: torch.Tensor


def empty_row_sum(partials: torch.Tensor, like: torch.Tensor) -> RowSum:
    """Allocates a sum in the shape and dtype of ``like``."""
    new = partials.new_zeros if like.numel() and not partials.numel() else partials.new_empty
    return RowSum(partials, new(like.shape, dtype=like.dtype))


class RowSumWork(NamedTuple):
    """A sum over rows as a launch does it beside its pass: arguments of the kernel, and programs. By default no sum."""

    operands: RowSumOperands | None = None
    rows: int = 0
    tile: RowSumTile | None = None
    programs: int = 0


def row_sum_works(sums: Iterable[RowSum], num_warps: int) -> tuple[RowSumWork, RowSumWork]:
    """Returns the work of at most two sums for programs of so many warps; sums without rows are left out."""
    works = []
    for s in sums:
        if s.partials.numel():
            rows, L = s.partials.shape
            block_l = vector_block(L, 16)
            tile = RowSumTile(max(64 * num_warps // block_l, 1), block_l)
            works.append(RowSumWork(RowSumOperands(s.partials, s.out, L), rows, tile, cdiv(L, block_l)))
    first, second, *_ = *works, RowSumWork(), RowSumWork()
    return first, second
