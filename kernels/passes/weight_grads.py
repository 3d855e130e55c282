"""Gradients of a gate's weights, from small tensors: work that a few programs do beside a pass over x.

Each sum is in the accumulation dtype and in a fixed order, and is rounded once, to the dtype of its weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import cdiv, vector_block
from ..core.launch import launch
from ..core.tiles import RELU, activate
from .pool import combine

SUMS = 2  # that a launch has room for


@triton.jit
def _mlp_grads(
    place, dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_R: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """dw2 [C, R] = sum_n dz act(hidden)^T, dw1 [R, C] = sum_n dhidden pooled^T, biases: tile ``place``, n in order."""
    acc_ty = dz_ptr.dtype.element_ty
    blocks_c = tl.cdiv(C, WEIGHT_C)
    c = place % blocks_c * WEIGHT_C + tl.arange(0, WEIGHT_C)
    r = place // blocks_c * WEIGHT_R + tl.arange(0, WEIGHT_R)
    dw1 = tl.zeros([WEIGHT_C, WEIGHT_R], acc_ty)
    dw2 = tl.zeros([WEIGHT_C, WEIGHT_R], acc_ty)
    db1 = tl.zeros([WEIGHT_R], acc_ty)
    db2 = tl.zeros([WEIGHT_C], acc_ty)
    for n in tl.range(0, N, loop_unroll_factor=UNROLL):
        dz = tl.load(dz_ptr + tl.cast(n, tl.int64) * C + c, mask=c < C, other=0.0)
        db2 += dz
        for branch in tl.static_range(BRANCHES):
            row = tl.cast(n, tl.int64) * BRANCHES + branch
            h = activate(tl.load(hidden_ptr + row * R + r, mask=r < R, other=0.0), HIDDEN_ACTIVATION)
            dh = tl.load(dhidden_ptr + row * R + r, mask=r < R, other=0.0)
            v = tl.load(pooled_ptr + row * C + c, mask=c < C, other=0.0)
            dw1 += v[:, None] * dh[None, :]
            dw2 += dz[:, None] * h[None, :]
            db1 += dh
    mask = (c < C)[:, None] & (r < R)[None, :]
    tl.store(dw1_ptr + r[None, :].to(tl.int64) * C + c[:, None], dw1, mask=mask)
    tl.store(dw2_ptr + c[:, None].to(tl.int64) * R + r[None, :], dw2, mask=mask)
    if db1_ptr is not None:
        tl.store(db1_ptr + r, db1, mask=(r < R) & (place % blocks_c == 0))
    if db2_ptr is not None:
        tl.store(db2_ptr + c, db2, mask=(c < C) & (place // blocks_c == 0))


@triton.jit
def _sum_rows(block, parts_ptr, out_ptr, rows, L, SUM_S: tl.constexpr, SUM_L: tl.constexpr):
    """out [L] = sum over the rows of parts [rows, L]: one block of columns, rows in a fixed order."""
    s, k = tl.arange(0, SUM_S), block * SUM_L + tl.arange(0, SUM_L)
    total = tl.zeros([SUM_S, SUM_L], parts_ptr.dtype.element_ty)
    for start in tl.range(0, rows, SUM_S, loop_unroll_factor=4):
        row = start + s[:, None]
        mask = (row < rows) & (k < L)[None, :]
        total += tl.load(parts_ptr + row.to(tl.int64) * L + k[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + k, tl.sum(total, 0), mask=k < L)


@triton.jit
def weight_grads_first(
    place, dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
    parts_ptr, out_ptr, rows, L, more_parts_ptr, more_out_ptr, more_rows, more_L,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_R: tl.constexpr,
    SUM_S: tl.constexpr, SUM_L: tl.constexpr, MORE_S: tl.constexpr, MORE_L: tl.constexpr,
):  # fmt: skip
    """What program ``place`` has to do; those that nothing is left for get a place of the pass beside, 0 and up."""
    if dw1_ptr is not None:
        programs = tl.cdiv(C, WEIGHT_C) * tl.cdiv(R, WEIGHT_R)
        if place < programs:
            _mlp_grads(
                place, dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
                BRANCHES, HIDDEN_ACTIVATION, WEIGHT_C, WEIGHT_R, 2,
            )  # fmt: skip
        place -= programs
    if parts_ptr is not None:
        programs = tl.cdiv(L, SUM_L)
        if (place >= 0) & (place < programs):
            _sum_rows(place, parts_ptr, out_ptr, rows, L, SUM_S, SUM_L)
        place -= programs
    if more_parts_ptr is not None:
        programs = tl.cdiv(more_L, MORE_L)
        if (place >= 0) & (place < programs):
            _sum_rows(place, more_parts_ptr, more_out_ptr, more_rows, more_L, MORE_S, MORE_L)
        place -= programs
    return place


@triton.jit(do_not_specialize=["N"])
def _weight_grads_kernel(
    dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, WEIGHT_C: tl.constexpr, WEIGHT_R: tl.constexpr,
):  # fmt: skip
    """`_mlp_grads` alone."""
    _mlp_grads(
        tl.program_id(0), dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
        BRANCHES, HIDDEN_ACTIVATION, WEIGHT_C, WEIGHT_R, 8,
    )  # fmt: skip


class MLPGrads(NamedTuple):
    """The gradients of an MLP's weights, and what they are made of.

    dz [N, C] and dhidden, like hidden, are the gradients before both activations.
    """

    dz: torch.Tensor
    hidden: torch.Tensor
    dhidden: torch.Tensor
    pooled: torch.Tensor
    hidden_activation: int
    dw1: torch.Tensor
    db1: torch.Tensor | None
    dw2: torch.Tensor
    db2: torch.Tensor | None

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """Those of weights and biases in turn, or of the weights alone."""
        return tuple(d for d in (self.dw1, self.db1, self.dw2, self.db2) if d is not None)

    def programs(self, block_c: int = 16) -> int:
        (N, C), R, meta = self.dz.shape, self.hidden.shape[-1], self.meta(block_c)
        return cdiv(C, meta["WEIGHT_C"]) * cdiv(R, meta["WEIGHT_R"]) if N else 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        (N, C), R = self.dz.shape, self.hidden.shape[-1]
        results = self.dw1, self.db1, self.dw2, self.db2
        return self.dz, self.hidden, self.dhidden, self.pooled, *results, N, C, R

    def meta(self, block_c: int = 16) -> dict[str, int]:
        """Tiles beside a pass are small: more registers a thread would leave fewer programs for the pass."""
        C, R = self.dz.shape[1], self.hidden.shape[-1]
        return {
            "BRANCHES": self.pooled.shape[1] if self.pooled.dim() == 3 else 1,
            "HIDDEN_ACTIVATION": self.hidden_activation,
            "WEIGHT_C": vector_block(C, block_c),
            "WEIGHT_R": vector_block(R, 16),
        }

    def run(self) -> None:
        """In a launch of their own."""
        launch(_weight_grads_kernel, self.programs(32), *self.arguments, **self.meta(32), num_warps=2)


class RowSum(NamedTuple):
    """out [L] = sum over the rows of parts [rows, L]."""

    parts: torch.Tensor
    out: torch.Tensor

    def run(self) -> None:
        """In a launch of its own."""
        combine(self.parts[None], None, self.out)


def mlp_grads(
    dz: torch.Tensor, dhidden: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, pooled: torch.Tensor,
    hidden: torch.Tensor, hidden_activation: int = RELU.value, biases: bool = True,
) -> MLPGrads:  # fmt: skip
    """Gradients that are yet to be written, each in its weight's dtype."""
    (N, C), R = dz.shape, w1.shape[0]
    new = dz.new_empty if N else dz.new_zeros
    db1, db2 = (new(R, dtype=w1.dtype), new(C, dtype=w2.dtype)) if biases else (None, None)
    dw1, dw2 = new(w1.shape, dtype=w1.dtype), new(w2.shape, dtype=w2.dtype)
    return MLPGrads(dz, hidden, dhidden, pooled, hidden_activation, dw1, db1, dw2, db2)


def row_sum(parts: torch.Tensor, like: torch.Tensor) -> RowSum:
    """A sum that is yet to be written, in the shape and dtype of ``like``."""
    new = parts.new_zeros if like.numel() and not parts.numel() else parts.new_empty
    return RowSum(parts, new(like.shape, dtype=like.dtype))


def beside(mlp: MLPGrads | None, sums: tuple[RowSum, ...], num_warps: int) -> tuple[int, list[Any], dict[str, int]]:
    """The programs that a launch has more for these, and the arguments and constants of `weight_grads_first`."""
    sums = tuple(s for s in sums if s.parts.numel())
    arguments: list[Any]
    if mlp is None or not mlp.programs():
        programs, arguments = 0, [None, None, None, None, None, None, None, None, 0, 0, 0]
        meta = {"BRANCHES": 1, "HIDDEN_ACTIVATION": RELU.value, "WEIGHT_C": 1, "WEIGHT_R": 1}
    else:
        programs, arguments, meta = mlp.programs(), [*mlp.arguments], mlp.meta()
    for name, s in zip(("SUM", "MORE"), (*sums, None, None), strict=False):
        if s is None:
            arguments += [None, None, 0, 0]
            meta |= {f"{name}_S": 1, f"{name}_L": 1}
            continue
        rows, L = s.parts.shape
        block = vector_block(L, 16)
        programs += cdiv(L, block)
        arguments += [s.parts, s.out, rows, L]
        meta |= {f"{name}_S": max(64 * num_warps // block, 1), f"{name}_L": block}
    return programs, arguments, meta
