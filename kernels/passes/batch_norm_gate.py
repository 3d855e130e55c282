"""Gates that are the sigmoid of a batch norm: of x itself, as in NAM, or of another map, as in GAM.

The logit is the line a rstd (x - mean) + b with a = weight share and b = bias share; NAM's share is
abs(weight) / sum(abs(weight)), else it is 1. Kernels that combine parts of sums make the line and the weights'
gradients, too: on small maps launches are what such vectors cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core.heuristics import TILE, cdiv, next_power_of_2, vector_block
from ..core.launch import launch
from ..core.layout import Layout, accumulation_dtype
from ..passes.self_gate.kernels import combined_moments
from ..passes.self_gate.passes import Gate, apply_gate, gate_dx, logit_sums, moments
from ..passes.self_gate.tiles import AFFINE
from .pool import pair_sums


@triton.jit
def _store_line(
    weight_ptr, bias_ptr, rstd_ptr, a_ptr, b_ptr, share_ptr, var, c, C, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """rstd, a and b of channels c from their var and, unless share_ptr is None, NAM's share, which is in a and b."""
    inside = c < C
    a = tl.load(weight_ptr + c, mask=inside, other=0.0).to(var.dtype)
    b = tl.load(bias_ptr + c, mask=inside, other=0.0).to(var.dtype)
    if share_ptr is not None:
        total = tl.zeros([BLOCK], var.dtype)
        for start in range(0, C, BLOCK):
            i = start + tl.arange(0, BLOCK)
            total += tl.abs(tl.load(weight_ptr + i, mask=i < C, other=0.0).to(var.dtype))
        share = tl.abs(a) / tl.sum(total, 0)
        a *= share
        b *= share
        tl.store(share_ptr + c, share, mask=inside)
    tl.store(rstd_ptr + c, 1 / tl.sqrt(var + EPS), mask=inside)
    tl.store(a_ptr + c, a, mask=inside)
    tl.store(b_ptr + c, b, mask=inside)


@triton.jit
def _batch_line_kernel(
    parts_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, rstd_ptr, a_ptr, b_ptr, share_ptr,
    C, HW, rows, parts, span, count, EPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """mean and var [C] of the batch, from parts [rows, 2, C] as `combined_moments` has them, and the line."""
    c = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    mean, second = combined_moments(parts_ptr, c, C, HW, rows, parts, span, count, BLOCK_S)
    var = second / count
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)
    _store_line(weight_ptr, bias_ptr, rstd_ptr, a_ptr, b_ptr, share_ptr, var, c, C, EPS, BLOCK)


@triton.jit
def _given_line_kernel(
    given_mean_ptr, given_var_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, rstd_ptr, a_ptr, b_ptr, share_ptr,
    C, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The line from statistics [C] that are given, and copies of these unless mean_ptr is None."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    var = tl.load(given_var_ptr + c, mask=c < C, other=0.0).to(rstd_ptr.dtype.element_ty)
    if mean_ptr is not None:
        tl.store(mean_ptr + c, tl.load(given_mean_ptr + c, mask=c < C, other=0.0), mask=c < C)
        tl.store(var_ptr + c, var, mask=c < C)
    _store_line(weight_ptr, bias_ptr, rstd_ptr, a_ptr, b_ptr, share_ptr, var, c, C, EPS, BLOCK)


@triton.jit
def _combine_grads_kernel(
    parts_ptr, rstd_ptr, share_ptr, sums_ptr, dweight_ptr, dbias_ptr, C, rows,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """sums [2, C] of parts [rows, 2, C], of r and r d, in order; dbias = share sum r, dweight = share rstd sum r d."""
    c = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    first, second = pair_sums(parts_ptr, c, C, rows, BLOCK_S)
    tl.store(sums_ptr + c, first, mask=c < C)
    tl.store(sums_ptr + C + c, second, mask=c < C)
    if share_ptr is not None:
        share = tl.load(share_ptr + c, mask=c < C, other=0.0)
        first *= share
        second *= share
    tl.store(dbias_ptr + c, first, mask=c < C)
    tl.store(dweight_ptr + c, second * tl.load(rstd_ptr + c, mask=c < C, other=0.0), mask=c < C)


class _Line(NamedTuple):
    """The line of each channel, [C] in the accumulation dtype; share only where it is not 1."""

    rstd: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    share: torch.Tensor | None

    @property
    def gate(self) -> Gate:
        return Gate(AFFINE, (self.a, self.b, None, None, None, None))


def _empty_line(like: torch.Tensor, shares: bool) -> _Line:
    rstd, a, b = (torch.empty_like(like) for _ in range(3))
    return _Line(rstd, a, b, torch.empty_like(like) if shares else None)


def _batch_line(
    x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor, eps: float, shares: bool
) -> tuple[torch.Tensor, torch.Tensor, _Line]:
    """The batch's mean and variance [C], and the line. Reads x once."""
    values, span = moments(x, layout)
    rows, C = values.shape[0] * values.shape[1], layout.C
    new = values.new_empty if rows else values.new_zeros
    mean, var = new(C), new(C)
    line = _empty_line(mean, shares)
    block = vector_block(C, 16)  # few channels to a program: there are many rows
    launch(
        _batch_line_kernel, cdiv(C, block) if rows else 0,
        values, weight.contiguous(), bias.contiguous(), mean, var, *line,
        C, layout.HW, rows, values.shape[1], span, layout.N * layout.HW, EPS=eps, BLOCK=vector_block(C),
        BLOCK_S=min(next_power_of_2(rows), TILE // 2 // block), BLOCK_L=block,
    )  # fmt: skip
    return mean, var, line


def _given_line(
    mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, shares: bool,
    copies: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> _Line:  # fmt: skip
    """The line from mean and variance [C], whose copies are written, too, where there is room for them."""
    C, line = weight.numel(), _empty_line(copies[0] if copies else mean, shares)
    vectors = (t.contiguous() for t in (mean, var, weight, bias))
    block = vector_block(C)
    launch(_given_line_kernel, cdiv(C, block), *vectors, *(copies or (None, None)), *line, C, EPS=eps, BLOCK=block)
    return line


def batch_gate_fwd(
    x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor | None,
    var: torch.Tensor | None, residual: torch.Tensor | None, activation: int, eps: float, shares: bool = False,
    z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, and mean and variance [C]: copies of those given, or the batch's. Reads x once, or for the batch's twice.

    ``shares``: as NAM. z, dense in x's layout, is scaled instead of x and read once.
    """
    if mean is None or var is None:
        mean, var, line = _batch_line(x, layout, weight, bias, eps, shares)
    else:
        copy = x.new_empty(layout.C, dtype=accumulation_dtype(x))
        copies = copy, torch.empty_like(copy)
        line = _given_line(mean, var, weight, bias, eps, shares, copies)
        mean, var = copies
    return apply_gate(x, layout, line.gate, mean, line.rstd, residual, activation, z), mean, var


def batch_gate_bwd(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor,
    residual: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, activation: int, eps: float, fixed: bool,
    shares: bool = False, z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dz, dresidual, dweight, dbias). Reads x, grad and z twice, or once where the statistics are `fixed`."""
    C, dx, dz = layout.C, layout.empty(x), None if z is None else layout.empty(x)
    if not layout.N:
        dresidual = layout.empty(x) if activation else x.new_empty(0)
        return dx, dz, dresidual, weight.new_zeros(C), bias.new_zeros(C)
    line = _given_line(mean, var, weight, bias, eps, shares)
    written = (dx, dz) if fixed else (None, None)
    g, dresidual, parts = logit_sums(grad, x, layout, line.gate, mean, line.rstd, residual, activation, z, *written)
    rows = parts.shape[0] * parts.shape[1]
    sums, dweight, dbias = parts.new_empty((2, C)), weight.new_empty(C), bias.new_empty(C)
    block = vector_block(C, 8)  # 32 bytes of a row, the least that memory moves
    launch(
        _combine_grads_kernel, cdiv(C, block), parts, line.rstd, line.share, sums, dweight, dbias, C, rows,
        BLOCK_S=min(next_power_of_2(rows), TILE // block), BLOCK_L=block,
    )  # fmt: skip
    if not fixed:
        gate_dx(g, x, layout, line.gate, mean, line.rstd, sums, dx, z, dz)
    return dx, dz, dresidual, dweight, dbias
