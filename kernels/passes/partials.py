"""Partial results of reductions that several programs share, and their combination in a fixed order.

Each of the programs that share a sum or a maximum leaves one partial, so partials are ``[N, splits, kept]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, SIGMOID, activate, gate_grad
from ..core.heuristics import TILE, cdiv, next_power_of_2, vector_block
from ..core.launch import launch

INDEX_MAX = tl.constexpr(2**31 - 1)
CHAIN = tl.constexpr(32)  # partials that a lane adds up in sequence, before it adds their sum to that of all


@triton.jit
def max_first(values, index, AXIS: tl.constexpr):
    """Returns the maximum along AXIS and its lowest index. NaN wins: tl.max alone would drop it on a GPU."""
    is_nan = values != values
    any_nan = tl.max(is_nan.to(tl.int32), AXIS) > 0
    best = tl.max(tl.where(is_nan, -float("inf"), values), AXIS)
    wins = tl.where(tl.expand_dims(any_nan, AXIS), is_nan, values == tl.expand_dims(best, AXIS))
    first = tl.min(tl.where(wins, index, INDEX_MAX), AXIS)
    return tl.where(any_nan, float("nan"), best), first


@triton.jit
def first_or_count(first, ties, AXIS: tl.constexpr):
    """Returns first, or minus the sum of ties if that is more than one."""
    count = tl.sum(ties, AXIS)
    return tl.where(count > 1, -count, first)


@triton.jit
def _first_rows(partials_ptr, n, k, L, splits, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns pointers to the first rows of one image's partials [N, splits, ROWS, L], and their mask [BLOCK_S, k]."""
    s = tl.arange(0, BLOCK_S)
    return partials_ptr + (n * splits + s[:, None]) * ROWS * L + k[None, :], (s < splits)[:, None] & (k < L)[None, :]


@triton.jit
def partials_sum(partials_ptr, n, k, L, splits, ROWS: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns the sum of the partials' first rows at columns k, in order."""
    rows, mask = _first_rows(partials_ptr, n, k, L, splits, ROWS, BLOCK_S)
    return tl.sum(tl.load(rows, mask=mask, other=0.0), 0)


@triton.jit
def partials_max(partials_ptr, argmax_ptr, n, k, L, splits, SHARE_TIES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns the maximum of the partials' second rows at columns k, and its index or minus the number of ties."""
    rows, mask = _first_rows(partials_ptr + L, n, k, L, splits, 2, BLOCK_S)
    values = tl.load(rows, mask=mask, other=-float("inf"))
    index_rows, _ = _first_rows(argmax_ptr, n, k, L, splits, 1, BLOCK_S)
    index = tl.load(index_rows, mask=mask, other=INDEX_MAX)
    value, first = max_first(values, index, 0)
    if SHARE_TIES:
        ties = (values == tl.expand_dims(value, 0)) & mask
        first = first_or_count(first, tl.where(ties, tl.where(index < 0, -index, 1), 0), 0)
    return value, first


@triton.jit
def add_compensated(total, lost, v):
    """Adds v to a long sum. Returns the new sum and what rounding took from it, to be added next time (Kahan)."""
    v -= lost
    new = total + v
    return new, tl.where(new - new == 0, (new - total) - v, 0.0)  # infinity stays infinity


@triton.jit
def pair_sums(partials_ptr, k, L, rows, BLOCK_S: tl.constexpr):
    """Returns both sums of partials [rows, 2, L] over the rows at columns k, BLOCK_S rows at a time, in order."""
    acc_ty = partials_ptr.dtype.element_ty
    firsts = tl.zeros([k.shape[0]], acc_ty)
    seconds = tl.zeros([k.shape[0]], acc_ty)
    for chain in range(0, rows, CHAIN * BLOCK_S):
        first = tl.zeros([BLOCK_S, k.shape[0]], acc_ty)
        second = tl.zeros([BLOCK_S, k.shape[0]], acc_ty)
        for start in range(chain, tl.minimum(chain + CHAIN * BLOCK_S, rows), BLOCK_S):
            row = start + tl.arange(0, BLOCK_S)
            mask = (row < rows)[:, None] & (k < L)[None, :]
            at = partials_ptr + row[:, None].to(tl.int64) * 2 * L + k[None, :]
            first += tl.load(at, mask=mask, other=0.0)
            second += tl.load(at + L, mask=mask, other=0.0)
        firsts += tl.sum(first, 0)
        seconds += tl.sum(second, 0)
    return firsts, seconds


@triton.jit
def _combine_pool_kernel(
    partials_ptr,
    partials_argmax_ptr,
    out_ptr,
    argmax_ptr,
    L,
    splits,
    divisor,
    SHARE_TIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """[N, splits, 2, L] -> [N, 2, L]: (sum / divisor, max), partials in order."""
    blocks = tl.cdiv(L, BLOCK_L)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    total = partials_sum(partials_ptr, n, k, L, splits, 2, BLOCK_S) / divisor
    value, first = partials_max(partials_ptr, partials_argmax_ptr, n, k, L, splits, SHARE_TIES, BLOCK_S)
    tl.store(out_ptr + n * 2 * L + k, total, mask=k < L)
    tl.store(out_ptr + (2 * n + 1) * L + k, value, mask=k < L)
    tl.store(argmax_ptr + n * L + k, first, mask=k < L)


@triton.jit
def _combine_kernel(
    partials_ptr,
    gate_ptr,
    bias_ptr,
    out_ptr,
    L,
    splits,
    divisor,
    GATE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """out [M, L] = act(sum of partials [M, splits, L] / divisor [* gate_act'(gate [M, L])] [+ bias [1]])."""
    wide: tl.constexpr = partials_ptr.dtype.element_ty.primitive_bitwidth >= 32  # else the sum has its result's width
    acc_ty: tl.constexpr = partials_ptr.dtype.element_ty if wide else out_ptr.dtype.element_ty
    blocks = tl.cdiv(L, BLOCK_L)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_S, BLOCK_L], acc_ty)
    lost = tl.zeros([BLOCK_S, BLOCK_L], acc_ty)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < splits)[:, None] & (k < L)[None, :]
        v = tl.load(partials_ptr + (m * splits + s[:, None]) * L + k[None, :], mask=mask, other=0.0).to(acc_ty)
        total, lost = add_compensated(total, lost, v)
    out = tl.sum(total, 0) / divisor
    if gate_ptr is not None:
        out *= gate_grad(tl.load(gate_ptr + m * L + k, mask=k < L, other=0.0).to(acc_ty), GATE_ACTIVATION)
    if bias_ptr is not None:
        out += tl.load(bias_ptr).to(acc_ty)
    tl.store(out_ptr + m * L + k, activate(out, ACTIVATION), mask=k < L)


class Partials(NamedTuple):
    """Partial sums [N * splits, kept], or sums and maxima [N * splits, 2, kept] with the maxima's argmax.

    The sums are not yet divided. A single partial with divisor 1 is the result.
    """

    values: torch.Tensor
    argmax: torch.Tensor | None
    splits: int
    divisor: int

    @property
    def images(self) -> int:
        return self.values.shape[0] // self.splits

    @property
    def complete(self) -> bool:
        return self.splits == self.divisor == 1

    @property
    def branches(self) -> int:
        return self.values.shape[1] if self.values.dim() == 3 else 1

    def empty_results(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocates the results and, with maxima, their argmax [N, kept]."""
        values = self.values.new_empty((self.images, *self.values.shape[1:]))
        return values, None if self.argmax is None else self.argmax.new_empty((self.images, self.values.shape[-1]))


def combine_pooled(p: Partials, share_ties: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the results and, with maxima, their argmax [N, kept]."""
    if p.complete:
        return p.values, p.argmax
    (out, argmax), kept = p.empty_results(), p.values.shape[-1]
    if argmax is None:
        return combine(p.values.view(-1, p.splits, kept), None, out, divisor=p.divisor), None
    block_s = next_power_of_2(p.splits)
    block = vector_block(kept, max(TILE // block_s, 4))
    launch(
        _combine_pool_kernel,
        p.images * cdiv(kept, block),
        p.values,
        p.argmax,
        out,
        argmax,
        kept,
        p.splits,
        p.divisor,
        SHARE_TIES=share_ties,
        BLOCK_S=block_s,
        BLOCK_L=block,
    )
    return out, argmax


def combine(
    partials: torch.Tensor,
    gate: torch.Tensor | None,
    out: torch.Tensor,
    gate_activation: int = SIGMOID.value,
    divisor: int = 1,
    bias: torch.Tensor | None = None,
    activation: int = NONE.value,
) -> torch.Tensor:
    """Writes out [M, L], in its own dtype, from partials [M, S, L] in a fixed order, and returns it.

    The sum over S is divided, then multiplied by the derivative of the gate's activation at gate [M, L], if given; the
    derivative is told from the gate's value. Bias [1] and activation come last.
    """
    M, S, L = partials.shape
    block = vector_block(L, 64)
    launch(
        _combine_kernel,
        M * cdiv(L, block),
        partials,
        gate,
        bias,
        out,
        L,
        S,
        divisor,
        GATE_ACTIVATION=gate_activation,
        ACTIVATION=activation,
        BLOCK_S=min(next_power_of_2(S), 2048 // block),
        BLOCK_L=block,
    )
    return out
