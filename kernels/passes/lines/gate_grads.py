"""Gradients of the gates of lines: of hidden lines, of the batch norm, of the lines' means, and of all weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core.activations import SIGMOID, gate_grad
from ...core.heuristics import PROGRAMS, cdiv, registers_for
from ...core.launch import launch
from ...core.product import add_exact_product
from ...core.tiles import bound_if
from ..partials import pair_sums
from .gates import (
    AxisWeights,
    GatedLines,
    Norm,
    at_hidden,
    at_lines,
    blocks_of_image,
    hard_swish,
    line_block,
    load_vector,
    load_weights,
    normed,
    store_partial,
    this_block,
)


class HiddenGrads(NamedTuple):
    """The tensors that the gradient of hidden lines is made of, as kernels take them."""

    daffine: Any  # [N, L, M], the gradient before the hardswish
    z: Any  # [N, L, M]
    norm: Any  # a `Norm`
    sums: Any  # [3, M]; see `_line_norm_grads_kernel`


@triton.jit
def _hard_swish_grad(g, v):
    return tl.where(v <= -3, 0.0, tl.where(v < 3, g * (v / 3 + 0.5), g))


@triton.jit
def _logit_grads(dgates_ptr, gates_ptr, n, line, exists, c, size):
    """Returns the gradients before the sigmoid, [BLOCK_L, BLOCK_C]."""
    offsets, mask = at_lines(n, line, exists, c, size)
    gates = tl.load(gates_ptr + offsets, mask=mask, other=0.0)
    return tl.load(dgates_ptr + offsets, mask=mask, other=0.0) * gate_grad(gates, SIGMOID)


@triton.jit
def _line_hidden_grads_kernel(
    dgates_ptr,
    gates_ptr,
    z_ptr,
    norm,
    weights,
    daffine_ptr,
    partials_ptr,
    size,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """daffine [N, L, M], the gradient before the hardswish, and each program's sums of it and of it times normal."""
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    acc_ty = daffine_ptr.dtype.element_ty
    n, columns, line, exists = this_block(size, BLOCK_L)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_L, BLOCK_M], acc_ty)
    for start in range(0, size.C, TILE.BLOCK_C):
        c = start + tl.arange(0, TILE.BLOCK_C)
        if columns:
            w = tl.trans(load_weights(weights.w_w, c, m, size.C, size.M, acc_ty))
        else:
            w = tl.trans(load_weights(weights.w_h, c, m, size.C, size.M, acc_ty))
        acc = add_exact_product(_logit_grads(dgates_ptr, gates_ptr, n, line, exists, c, size), w, acc)
    offsets, mask = at_hidden(n, line, exists, m, size)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
    normal, affine, _ = normed(z, norm, m, size, EPS)
    daffine = tl.where(mask, _hard_swish_grad(acc, affine), 0.0)
    tl.store(daffine_ptr + offsets, daffine, mask=mask)
    store_partial(partials_ptr, tl.sum(daffine, 0), tl.sum(tl.where(mask, daffine * normal, 0.0), 0), m, size)


@triton.jit
def _line_norm_grads_kernel(
    partials_ptr,
    var_ptr,
    bn_weight_ptr,
    sums_ptr,
    rows,
    size,
    EPS: tl.constexpr,
    FIXED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sums [3, M]: the gradients of the norm's bias and weight, sums of partials in order, and of b1."""
    acc_ty = sums_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dbias, dweight = pair_sums(partials_ptr, m, size.M, rows, BLOCK_S)
    tl.store(sums_ptr + m, dbias, mask=m < size.M)
    tl.store(sums_ptr + size.M + m, dweight, mask=m < size.M)
    db1 = tl.zeros([BLOCK_M], acc_ty)  # the batch's mean cancels it
    if FIXED:
        inverse = 1 / tl.sqrt(load_vector(var_ptr, m, size.M, 1.0, acc_ty) + EPS)
        db1 = dbias * inverse * load_vector(bn_weight_ptr, m, size.M, 1.0, acc_ty)
    tl.store(sums_ptr + 2 * size.M + m, db1, mask=m < size.M)


@triton.jit
def _z_grads(hidden, n, line, exists, m, count, size, EPS: tl.constexpr, FIXED: tl.constexpr):
    """Returns the gradient of z, and hidden, [BLOCK_L, BLOCK_M]."""
    offsets, mask = at_hidden(n, line, exists, m, size)
    z = tl.load(hidden.z + offsets, mask=mask, other=0.0)
    normal, affine, gain = normed(z, hidden.norm, m, size, EPS)
    dz = tl.load(hidden.daffine + offsets, mask=mask, other=0.0)
    if not FIXED:
        dbias = load_vector(hidden.sums, m, size.M, 0.0, z.dtype)
        dweight = load_vector(hidden.sums + size.M, m, size.M, 0.0, z.dtype)
        dz -= (dbias[None, :] + normal * dweight[None, :]) / count
    return tl.where(mask, dz * gain[None, :], 0.0), tl.where(mask, hard_swish(affine), 0.0)


@triton.jit
def _line_mean_grads_kernel(
    hidden, w1_ptr, dmeans_ptr, count, size, EPS: tl.constexpr, FIXED: tl.constexpr, TILE: tl.constexpr
):
    """dmeans [N, C, L] = w1^T dz."""
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    acc_ty = dmeans_ptr.dtype.element_ty
    n, _columns, line, exists = this_block(size, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_L, BLOCK_C], acc_ty)
    for start in range(0, size.M, TILE.BLOCK_M):
        m = start + tl.arange(0, TILE.BLOCK_M)
        dz, _ = _z_grads(hidden, n, line, exists, m, count, size, EPS, FIXED)
        acc = add_exact_product(dz, tl.trans(load_weights(w1_ptr, m, c, size.M, size.C, acc_ty)), acc)
    offsets, mask = at_lines(n, line, exists, c, size)
    tl.store(dmeans_ptr + offsets, acc, mask=mask)


@triton.jit
def _line_weight_partials_kernel(
    dgates_ptr,
    gates_ptr,
    means_ptr,
    hidden,
    partials_ptr,
    N,
    count,
    size,
    EPS: tl.constexpr,
    FIXED: tl.constexpr,
    TILE: tl.constexpr,
):
    """partials [splits, 3 C M + 2 C]: dw_h, dw_w [C, M], dw1 [M, C], db_h, db_w [C] of a share of all blocks."""
    BLOCK_L: tl.constexpr = TILE.BLOCK_L
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    acc_ty = partials_ptr.dtype.element_ty
    blocks_c = tl.cdiv(size.C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(0) // blocks_c * BLOCK_M + tl.arange(0, BLOCK_M)
    weights = size.C * size.M
    partials_ptr += tl.program_id(1).to(tl.int64) * (3 * weights + 2 * size.C)
    mask = (c < size.C)[:, None] & (m < size.M)[None, :]
    dw1 = tl.zeros([BLOCK_C, BLOCK_M], acc_ty)
    row_blocks, blocks = tl.cdiv(size.H, BLOCK_L), blocks_of_image(size, BLOCK_L)
    for axis in tl.static_range(2):
        begin = row_blocks if axis else 0
        axis_blocks = blocks - row_blocks if axis else row_blocks
        dw = tl.zeros([BLOCK_C, BLOCK_M], acc_ty)
        db = tl.zeros([BLOCK_C], acc_ty)
        share = tl.cdiv(N * axis_blocks, tl.num_programs(1))
        first = tl.program_id(1) * share
        for step in range(first, tl.minimum(first + share, N * axis_blocks)):
            n = (step // axis_blocks).to(tl.int64)
            _, line, exists = line_block(begin + step % axis_blocks, size, BLOCK_L)
            dlogits = _logit_grads(dgates_ptr, gates_ptr, n, line, exists, c, size)
            dz, activated = _z_grads(hidden, n, line, exists, m, count, size, EPS, FIXED)
            offsets, lines_mask = at_lines(n, line, exists, c, size)
            means = tl.load(means_ptr + offsets, mask=lines_mask, other=0.0)
            dw = add_exact_product(tl.trans(dlogits), activated, dw)
            dw1 = add_exact_product(tl.trans(means), dz, dw1)
            db += tl.sum(dlogits, 0)
        tl.store(partials_ptr + axis * weights + c[:, None] * size.M + m[None, :], dw, mask=mask)
        in_first = c < bound_if(tl.program_id(0) < blocks_c, size.C)
        tl.store(partials_ptr + 3 * weights + axis * size.C + c, db, mask=in_first)
    tl.store(partials_ptr + 2 * weights + m[None, :] * size.C + c[:, None], dw1, mask=mask)


@triton.jit
def _line_weight_grads_kernel(partials_ptr, dw1_ptr, dweights, splits, size, BLOCK: tl.constexpr):
    """Sums of `_line_weight_partials_kernel`'s partials, in order, each in its gradient's dtype."""
    weights = size.C * size.M
    length = 3 * weights + 2 * size.C
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], partials_ptr.dtype.element_ty)
    for split in tl.range(0, splits, loop_unroll_factor=4):
        total += tl.load(partials_ptr + tl.cast(split, tl.int64) * length + k, mask=k < length, other=0.0)
    tl.store(dweights.w_h + k, total, mask=k < weights)
    tl.store(dweights.w_w + k - weights, total, mask=(k >= weights) & (k < 2 * weights))
    tl.store(dw1_ptr + k - 2 * weights, total, mask=(k >= 2 * weights) & (k < 3 * weights))
    k -= 3 * weights
    tl.store(dweights.b_h + k, total, mask=(k >= 0) & (k < size.C))
    tl.store(dweights.b_w + k - size.C, total, mask=(k >= size.C) & (k < 2 * size.C))


class LineGateGrads(NamedTuple):
    """Gates and their gradients, strided as the lines' means, and the batch norm's eps and whether it is fixed."""

    lines: GatedLines
    dgates: torch.Tensor
    gates: torch.Tensor
    eps: float
    fixed: bool

    @property
    def images(self) -> int:
        return self.lines.means.shape[0]

    @property
    def all_lines(self) -> int:
        """Lines of the whole batch."""
        return self.images * self.lines.means.shape[2]


def line_gate_grads(
    lines: GatedLines, dgates: torch.Tensor, gates: torch.Tensor, eps: float, fixed: bool
) -> LineGateGrads:
    dgates, gates = (_like(t, lines.means) for t in (dgates, gates))
    return LineGateGrads(lines, dgates, gates, eps, fixed)


def _like(t: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    return t if t.stride() == means.stride() else torch.empty_like(means).copy_(t)


def hidden_grads(g: LineGateGrads, z: torch.Tensor, norm: Norm, weights: AxisWeights) -> HiddenGrads:
    """Returns what the gradient of hidden lines is made of; the sums are zeros for an empty batch."""
    lines, M = g.lines, g.lines.size.M
    daffine, partials = torch.empty_like(z), z.new_empty((lines.programs, 2, M))
    launch(
        _line_hidden_grads_kernel,
        lines.programs,
        g.dgates,
        g.gates,
        z,
        norm,
        weights,
        daffine,
        partials,
        lines.size,
        EPS=g.eps,
        TILE=lines.tile,
        splits=lines.blocks_m,
    )
    sums = (z.new_empty if g.images else z.new_zeros)((3, M))
    launch(
        _line_norm_grads_kernel,
        lines.blocks_m if g.images else 0,
        partials,
        norm.var,
        norm.weight,
        sums,
        lines.programs,
        lines.size,
        EPS=g.eps,
        FIXED=g.fixed,
        **lines.combining,
    )
    return HiddenGrads(daffine, z, norm, sums)


def mean_grads(g: LineGateGrads, hidden: HiddenGrads, w1: torch.Tensor) -> torch.Tensor:
    """Returns dmeans, like means."""
    lines, dmeans = g.lines, torch.empty_like(g.lines.means)
    launch(
        _line_mean_grads_kernel,
        lines.programs,
        hidden,
        w1.contiguous(),
        dmeans,
        g.all_lines,
        lines.size,
        EPS=g.eps,
        FIXED=g.fixed,
        TILE=lines.tile,
        **registers_for(lines.means, 4),
        splits=lines.blocks_c,
    )
    return dmeans


def line_weight_grads(
    g: LineGateGrads, hidden: HiddenGrads, w1: torch.Tensor, w_h: torch.Tensor, w_w: torch.Tensor
) -> tuple[torch.Tensor, AxisWeights]:
    """Returns dw1 and the gradients of both axes' weights, in their dtypes; their biases' are in the means' dtype."""
    lines, C, M = g.lines, g.lines.size.C, g.lines.size.M
    new = lines.means.new_empty if g.images else lines.means.new_zeros
    dw1, dw_h, dw_w = (new(w.shape, dtype=w.dtype) for w in (w1, w_h, w_w))
    dweights = AxisWeights(dw_h, new(C), dw_w, new(C))
    # Partial sums are to move less than the lines do.
    programs, length = lines.blocks_c * lines.blocks_m, 3 * C * M + 2 * C
    splits = max(min(cdiv(PROGRAMS, programs), g.all_lines // (4 * M)), 1)
    partials = lines.means.new_empty((splits, length))
    launch(
        _line_weight_partials_kernel,
        programs if g.images else 0,
        g.dgates,
        g.gates,
        lines.means,
        hidden,
        partials,
        g.images,
        g.all_lines,
        lines.size,
        EPS=g.eps,
        FIXED=g.fixed,
        TILE=lines.tile,
        splits=splits,
    )
    launch(
        _line_weight_grads_kernel,
        cdiv(length, 256) if g.images else 0,
        partials,
        dw1,
        dweights,
        splits,
        lines.size,
        BLOCK=256,
    )
    return dw1, dweights
