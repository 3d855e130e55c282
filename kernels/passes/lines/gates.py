"""Gates of lines: two products with weights, `[lines, C] -> [lines, M] -> [lines, C]`, with a batch norm between them.

A block of lines is of one image, and all of them are rows, or all are columns. A program that takes one has whole sums
of a tile of the product. Products are few, and exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core.activations import HARD_SIGMOID, activate, sigmoid
from ...core.heuristics import cdiv, next_power_of_2, registers_for
from ...core.launch import launch
from ...core.product import add_exact_product

BLOCK_L = 16  # lines of a program: images are few, and each has hardly more than a hundred
WIDEST = 32  # channels, or hidden ones, that a program has at a time; products take 16 at least


class LineSizes(NamedTuple):
    """The sizes of lines `[N, C, H + W]` and hidden lines `[N, H + W, M]`; kernels get them as ``size``."""

    C: Any
    H: Any
    W: Any
    M: Any
    stride_c: Any
    stride_l: Any


class LineTile(NamedTuple):
    """Lines, channels and hidden channels of a program; kernels take it as ``TILE``."""

    BLOCK_L: int
    BLOCK_C: int
    BLOCK_M: int


class Norm(NamedTuple):
    """Statistics [M] and weights [M], or None, of the batch norm, as kernels take them."""

    mean: Any
    var: Any
    weight: Any
    bias: Any


class AxisWeights(NamedTuple):
    """Weights [C, M] and biases [C], or None, of rows and of columns, as kernels take them."""

    w_h: Any
    b_h: Any
    w_w: Any
    b_w: Any


@triton.jit
def line_block(block, size, BLOCK_L: tl.constexpr):
    """Returns whether the lines of a block of an image are columns, the lines [BLOCK_L], and which of them exist."""
    row_blocks = tl.cdiv(size.H, BLOCK_L)
    columns = block >= row_blocks
    line = tl.where(columns, size.H + (block - row_blocks) * BLOCK_L, block * BLOCK_L) + tl.arange(0, BLOCK_L)
    return columns, line, line < tl.where(columns, size.H + size.W, size.H)


@triton.jit
def blocks_of_image(size, BLOCK_L: tl.constexpr):
    return tl.cdiv(size.H, BLOCK_L) + tl.cdiv(size.W, BLOCK_L)


@triton.jit
def this_block(size, BLOCK_L: tl.constexpr):
    """Returns this program's image (int64) and its `line_block`."""
    blocks = blocks_of_image(size, BLOCK_L)
    columns, line, exists = line_block(tl.program_id(0) % blocks, size, BLOCK_L)
    return (tl.program_id(0) // blocks).to(tl.int64), columns, line, exists


@triton.jit
def at_lines(n, line, exists, c, size):
    """Returns offsets in lines, int64, and their mask, [BLOCK_L, BLOCK_C]."""
    image = n * size.C * (size.H + size.W)
    offsets = line[:, None].to(tl.int64) * size.stride_l + c[None, :].to(tl.int64) * size.stride_c
    return image + offsets, exists[:, None] & (c < size.C)[None, :]


@triton.jit
def at_hidden(n, line, exists, m, size):
    """Returns offsets in hidden lines, int64, and their mask, [BLOCK_L, BLOCK_M]."""
    row = n * (size.H + size.W) + line
    return row[:, None] * size.M + m[None, :], exists[:, None] & (m < size.M)[None, :]


@triton.jit
def load_weights(w_ptr, o, i, outputs, inputs, acc_ty: tl.constexpr):
    """Returns a tile of w [outputs, inputs] as [inputs, outputs]."""
    offsets = o[None, :].to(tl.int64) * inputs + i[:, None]
    return tl.load(w_ptr + offsets, mask=(o < outputs)[None, :] & (i < inputs)[:, None], other=0.0).to(acc_ty)


@triton.jit
def load_vector(ptr, i, length, default, acc_ty: tl.constexpr):
    """Returns elements i, or the default if there is no vector."""
    if ptr is None:
        found = tl.full(i.shape, default, acc_ty)
    else:
        found = tl.load(ptr + i, mask=i < length, other=default).to(acc_ty)
    return found


@triton.jit
def normed(z, norm, m, size, EPS: tl.constexpr):
    """Returns the batch norm of z [BLOCK_L, BLOCK_M], without and with its weight and bias, and its factor of z."""
    acc_ty: tl.constexpr = z.dtype
    inverse = 1 / tl.sqrt(load_vector(norm.var, m, size.M, 1.0, acc_ty) + EPS)
    normal = (z - load_vector(norm.mean, m, size.M, 0.0, acc_ty)[None, :]) * inverse[None, :]
    weight = load_vector(norm.weight, m, size.M, 1.0, acc_ty)
    affine = normal * weight[None, :] + load_vector(norm.bias, m, size.M, 0.0, acc_ty)[None, :]
    return normal, affine, inverse * weight


@triton.jit
def hard_swish(v):
    return v * activate(v, HARD_SIGMOID)


@triton.jit
def store_partial(partials_ptr, a, b, m, size):
    """Stores this program's partial of two vectors, partials [programs, 2, M]."""
    partials_ptr += tl.program_id(0).to(tl.int64) * 2 * size.M + m
    tl.store(partials_ptr, a, mask=m < size.M)
    tl.store(partials_ptr + size.M, b, mask=m < size.M)


@triton.jit
def _line_hidden_kernel(means_ptr, w1_ptr, b1_ptr, z_ptr, partials_ptr, size, TILE: tl.constexpr):
    """z = w1 means + b1 [N, L, M].

    With partials_ptr also the mean of each program's lines, and the sum of their squared deviations from it.
    """
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    acc_ty = z_ptr.dtype.element_ty
    n, _columns, line, exists = this_block(size, BLOCK_L)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    z = tl.zeros([BLOCK_L, BLOCK_M], acc_ty)
    for start in range(0, size.C, TILE.BLOCK_C):
        c = start + tl.arange(0, TILE.BLOCK_C)
        offsets, mask = at_lines(n, line, exists, c, size)
        means = tl.load(means_ptr + offsets, mask=mask, other=0.0)
        z = add_exact_product(means, load_weights(w1_ptr, m, c, size.M, size.C, acc_ty), z)
    z += load_vector(b1_ptr, m, size.M, 0.0, acc_ty)[None, :]
    offsets, mask = at_hidden(n, line, exists, m, size)
    tl.store(z_ptr + offsets, z, mask=mask)
    if partials_ptr is not None:
        first = tl.sum(tl.where((tl.arange(0, BLOCK_L) == 0)[:, None], z, 0.0), 0)
        first = tl.where(tl.abs(first) < float("inf"), first, 0.0)  # the differences of equal lines are 0
        count = tl.sum(exists.to(acc_ty), 0)
        mean = first + tl.sum(tl.where(exists[:, None], z - first[None, :], 0.0), 0) / count
        apart = tl.where(exists[:, None], z - mean[None, :], 0.0)
        store_partial(partials_ptr, mean, tl.sum(apart * apart, 0), m, size)


@triton.jit
def _partial_rows(partials_ptr, start, rows, m, size, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns the lines behind rows of partials [BLOCK_S, 1], pointers to their first vectors, and the mask."""
    row = start + tl.arange(0, BLOCK_S)
    block, row_blocks = row % blocks_of_image(size, BLOCK_L), tl.cdiv(size.H, BLOCK_L)
    left = tl.where(block < row_blocks, size.H - block * BLOCK_L, size.W - (block - row_blocks) * BLOCK_L)
    lines = tl.minimum(left, BLOCK_L).to(partials_ptr.dtype.element_ty)
    at = partials_ptr + row[:, None].to(tl.int64) * 2 * size.M + m[None, :]
    return lines[:, None], at, (row < rows)[:, None] & (m < size.M)[None, :]


@triton.jit
def _line_statistics_kernel(
    partials_ptr,
    mean_ptr,
    var_ptr,
    rows,
    count,
    size,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """mean and var [M] of all lines from partials [rows, 2, M], in order."""
    acc_ty = mean_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(partials_ptr + m, mask=m < size.M, other=0.0)
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    total = tl.zeros([BLOCK_S, BLOCK_M], acc_ty)
    for start in range(0, rows, BLOCK_S):
        lines, at, mask = _partial_rows(partials_ptr, start, rows, m, size, BLOCK_L, BLOCK_S)
        total += lines * tl.where(mask, tl.load(at, mask=mask, other=0.0) - first[None, :], 0.0)
    mean = first + tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_S, BLOCK_M], acc_ty)
    for start in range(0, rows, BLOCK_S):
        lines, at, mask = _partial_rows(partials_ptr, start, rows, m, size, BLOCK_L, BLOCK_S)
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        total += tl.load(at + size.M, mask=mask, other=0.0) + lines * apart * apart
    tl.store(mean_ptr + m, mean, mask=m < size.M)
    tl.store(var_ptr + m, tl.sum(total, 0) / count, mask=m < size.M)


@triton.jit
def _line_gates_kernel(z_ptr, norm, weights, gates_ptr, size, EPS: tl.constexpr, TILE: tl.constexpr):
    """gates = sigmoid(w hardswish(bn(z)) + b) [N, C, L]; w and b are those of rows or of columns."""
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    acc_ty = gates_ptr.dtype.element_ty
    n, columns, line, exists = this_block(size, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_L, BLOCK_C], acc_ty)
    for start in range(0, size.M, TILE.BLOCK_M):
        m = start + tl.arange(0, TILE.BLOCK_M)
        offsets, mask = at_hidden(n, line, exists, m, size)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
        _, affine, _ = normed(z, norm, m, size, EPS)
        hidden = tl.where(mask, hard_swish(affine), 0.0)
        if columns:
            w = load_weights(weights.w_w, c, m, size.C, size.M, acc_ty)
        else:
            w = load_weights(weights.w_h, c, m, size.C, size.M, acc_ty)
        acc = add_exact_product(hidden, w, acc)
    if columns:
        acc += load_vector(weights.b_w, c, size.C, 0.0, acc_ty)[None, :]
    else:
        acc += load_vector(weights.b_h, c, size.C, 0.0, acc_ty)[None, :]
    offsets, mask = at_lines(n, line, exists, c, size)
    tl.store(gates_ptr + offsets, sigmoid(acc), mask=mask)


class GatedLines(NamedTuple):
    """Dense lines, their sizes, the tile of both products, and the programs that take all blocks of lines."""

    means: torch.Tensor
    size: LineSizes
    tile: LineTile
    programs: int

    @property
    def blocks_m(self) -> int:
        return cdiv(self.size.M, self.tile.BLOCK_M)

    @property
    def blocks_c(self) -> int:
        return cdiv(self.size.C, self.tile.BLOCK_C)

    @property
    def combining(self) -> dict[str, int]:
        """Launch parameters of the kernels that combine the programs' partials."""
        block_m = self.tile.BLOCK_M
        block_s = min(next_power_of_2(self.programs), 2048 // block_m)
        return {"BLOCK_S": block_s, "BLOCK_M": block_m, **registers_for(self.means, 4)}


def gated_lines(means: torch.Tensor, height: int, w1: torch.Tensor) -> GatedLines:
    """Prepares lines [N, C, L] for the passes; the first ``height`` are rows."""
    N, C, L = means.shape
    dense = means.is_contiguous() or means.mT.is_contiguous()
    means, M = means if dense else means.contiguous(), w1.shape[0]
    block_c, block_m = (min(max(next_power_of_2(k), 16), WIDEST) for k in (C, M))
    programs = N * (cdiv(height, BLOCK_L) + cdiv(L - height, BLOCK_L))
    size = LineSizes(C, height, L - height, M, *means.stride()[1:])
    return GatedLines(means, size, LineTile(BLOCK_L, block_c, block_m), programs)


def hidden_lines(
    lines: GatedLines, w1: torch.Tensor, b1: torch.Tensor | None, with_partials: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns z [N, L, M] and, if asked for, partials of its statistics. Reads means once for each block of M."""
    means, size = lines.means, lines.size
    z = means.new_empty((means.shape[0], means.shape[2], size.M))
    partials = means.new_empty((lines.programs, 2, size.M)) if with_partials else None
    launch(
        _line_hidden_kernel, lines.programs, means, w1, b1, z, partials, size, TILE=lines.tile, splits=lines.blocks_m
    )
    return z, partials


def hidden_statistics(lines: GatedLines, partials: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and variance [M] of all hidden lines; zeros for an empty batch."""
    N, _, L = lines.means.shape
    new = partials.new_empty if N else partials.new_zeros
    mean, var = new(lines.size.M), new(lines.size.M)
    launch(
        _line_statistics_kernel,
        lines.blocks_m if N else 0,
        partials,
        mean,
        var,
        lines.programs,
        N * L,
        lines.size,
        BLOCK_L=BLOCK_L,
        **lines.combining,
    )
    return mean, var


def sigmoid_lines(lines: GatedLines, z: torch.Tensor, norm: Norm, weights: AxisWeights, eps: float) -> torch.Tensor:
    """Returns the gates, like means. Reads z once for each block of C, writes the gates once."""
    gates = torch.empty_like(lines.means)
    launch(
        _line_gates_kernel,
        lines.programs,
        z,
        norm,
        weights,
        gates,
        lines.size,
        EPS=eps,
        TILE=lines.tile,
        splits=lines.blocks_c,
    )
    return gates
