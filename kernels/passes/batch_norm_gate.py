"""Gates that are the sigmoid of a batch norm: of x itself, as in NAM, or of another map, as in GAM.

The logit is the line a rstd (x - mean) + b with a = weight share and b = bias share. NAM's share is
abs(weight) / sum(abs(weight)); otherwise it is 1. Kernels that combine partial sums also make the line and the weights'
gradients, because such vectors cost launches on small maps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import TILE, cdiv, next_power_of_2, vector_block
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from .partials import pair_sums
from .self_gate.gate import Gate
from .self_gate.moments import combined_moments, moments
from .self_gate.streams import apply_self_gate, logit_sums, self_gate_dx
from .self_gate.tiles import AFFINE, Line


class NormLine(NamedTuple):
    """The line of each channel, [C] in the accumulation dtype; share is None if it is 1."""

    rstd: Any
    a: Any
    b: Any
    share: Any

    @property
    def gate(self) -> Gate:
        return Gate(AFFINE, Line(self.a, self.b))


@triton.jit
def _store_line(weight_ptr, bias_ptr, line, var, c, C, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the line of channels c from their var and, unless line.share is None, NAM's share."""
    inside = c < C
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(var.dtype)
    b = tl.load(bias_ptr + c, mask=inside, other=0.0).to(var.dtype)
    if line.share is not None:
        total = tl.zeros([BLOCK], var.dtype)
        for start in range(0, C, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.abs(tl.load(weight_ptr + i, mask=i < C, other=0.0).to(var.dtype))
        share = tl.abs(a) / tl.sum(total, 0)
        a *= share
        b *= share
        tl.store(line.share + c, share, mask=inside)
    tl.store(line.rstd + c, 1 / tl.sqrt(var + EPS), mask=inside)
    tl.store(line.a + c, a, mask=inside)
    tl.store(line.b + c, b, mask=inside)


@triton.jit
def _batch_line_kernel(
    partials_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    line,
    size,
    rows,
    splits,
    span,
    count,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """mean and var [C] of the batch, from partials [rows, 2, C] as `combined_moments` takes them, and the line."""
    c = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    mean, second = combined_moments(partials_ptr, c, size, rows, splits, span, count, BLOCK_S)
    var = second / count
    tl.store(mean_ptr + c, mean, mask=c < size.C)
    tl.store(var_ptr + c, var, mask=c < size.C)
    _store_line(weight_ptr, bias_ptr, line, var, c, size.C, EPS, BLOCK)


@triton.jit
def _given_line_kernel(
    given_mean_ptr,
    given_var_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    line,
    C,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The line from given statistics [C], and copies of these unless mean_ptr is None."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    var = tl.load(given_var_ptr + c, mask=c < C, other=0.0).to(line.rstd.dtype.element_ty)
    if mean_ptr is not None:
        tl.store(mean_ptr + c, tl.load(given_mean_ptr + c, mask=c < C, other=0.0), mask=c < C)
        tl.store(var_ptr + c, var, mask=c < C)
    _store_line(weight_ptr, bias_ptr, line, var, c, C, EPS, BLOCK)


@triton.jit
def _combine_grads_kernel(
    partials_ptr,
    rstd_ptr,
    share_ptr,
    sums_ptr,
    dweight_ptr,
    dbias_ptr,
    C,
    rows,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """sums [2, C] of r and r d, from partials [rows, 2, C] in order.

    dbias = share sum r, dweight = share rstd sum r d.
    """
    c = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    first, second = pair_sums(partials_ptr, c, C, rows, BLOCK_S)
    tl.store(sums_ptr + c, first, mask=c < C)
    tl.store(sums_ptr + C + c, second, mask=c < C)
    if share_ptr is not None:
        share = tl.load(share_ptr + c, mask=c < C, other=0.0)
        first *= share
        second *= share
    tl.store(dbias_ptr + c, first, mask=c < C)
    tl.store(dweight_ptr + c, second * tl.load(rstd_ptr + c, mask=c < C, other=0.0), mask=c < C)


def _empty_line(like: torch.Tensor, shares: bool) -> NormLine:
    rstd, a, b = (torch.empty_like(like) for _ in range(3))
    return NormLine(rstd, a, b, torch.empty_like(like) if shares else None)


def _batch_line(
    x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor, eps: float, shares: bool
) -> tuple[torch.Tensor, torch.Tensor, NormLine]:
    """Returns the batch's mean and variance [C], and the line. Reads x once."""
    values, span = moments(x, layout)
    rows, C = values.shape[0] * values.shape[1], layout.C
    new = values.new_empty if rows else values.new_zeros
    mean, var = new(C), new(C)
    line = _empty_line(mean, shares)
    block = vector_block(C, 16)  # few channels to a program: there are many rows
    launch(
        _batch_line_kernel,
        cdiv(C, block) if rows else 0,
        values,
        weight.contiguous(),
        bias.contiguous(),
        mean,
        var,
        line,
        layout.sizes,
        rows,
        values.shape[1],
        span,
        layout.N * layout.HW,
        EPS=eps,
        BLOCK=vector_block(C),
        BLOCK_S=min(next_power_of_2(rows), TILE // 2 // block),
        BLOCK_L=block,
    )
    return mean, var, line


def _given_line(
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    shares: bool,
    copies: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> NormLine:
    """Returns the line from mean and variance [C], and writes them to ``copies`` if given."""
    C, line = weight.numel(), _empty_line(copies[0] if copies else mean, shares)
    vectors = (t.contiguous() for t in (mean, var, weight, bias))
    block = vector_block(C)
    launch(_given_line_kernel, cdiv(C, block), *vectors, *(copies or (None, None)), line, C, EPS=eps, BLOCK=block)
    return line


def batch_gate(
    x: torch.Tensor,
    layout: Layout,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    eps: float,
    shares: bool = False,
    z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, and mean and variance [C]: copies of the given ones, or the batch's.

    Reads x once, or twice for the batch's statistics. ``shares`` is NAM's. z, dense in x's layout, is scaled instead of
    x and read once.
    """
    if mean is None or var is None:
        mean, var, line = _batch_line(x, layout, weight, bias, eps, shares)
    else:
        copy = x.new_empty((layout.C,), dtype=accumulation_dtype(x))
        copies = copy, torch.empty_like(copy)
        line = _given_line(mean, var, weight, bias, eps, shares, copies)
        mean, var = copies
    return apply_self_gate(x, layout, line.gate, mean, line.rstd, residual, activation, z), mean, var


def batch_gate_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    activation: int,
    eps: float,
    fixed: bool,
    shares: bool = False,
    z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dz, dresidual, dweight, dbias).

    Reads x, grad and z twice, or once if the statistics are `fixed`.
    """
    C, dx, dz = layout.C, layout.empty(x), None if z is None else layout.empty(x)
    if not layout.N:
        return dx, dz, layout.empty_dresidual(x, activation), weight.new_zeros(C), bias.new_zeros(C)
    line = _given_line(mean, var, weight, bias, eps, shares)
    written = (dx, dz) if fixed else (None, None)
    g, dresidual, partials = logit_sums(grad, x, layout, line.gate, mean, line.rstd, residual, activation, z, *written)
    rows = partials.shape[0] * partials.shape[1]
    sums, dweight, dbias = partials.new_empty((2, C)), weight.new_empty(C), bias.new_empty(C)
    block = vector_block(C, 8)  # 32 bytes of a row, the least that memory moves
    launch(
        _combine_grads_kernel,
        cdiv(C, block),
        partials,
        line.rstd,
        line.share,
        sums,
        dweight,
        dbias,
        C,
        rows,
        BLOCK_S=min(next_power_of_2(rows), TILE // block),
        BLOCK_L=block,
    )
    if not fixed:
        self_gate_dx(g, x, layout, line.gate, mean, line.rstd, sums, dx, z, dz)
    return dx, dz, dresidual, dweight, dbias
