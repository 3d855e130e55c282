"""Kernels of the gates of lines: two products with weights, `[lines, C] -> [lines, M] -> [lines, C]`, and back.

A block of lines is of one image, and all of them are rows, or columns. A program that takes one has whole sums of a
tile of the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...core.product import dot
from ...core.tiles import HARD_SIGMOID, SIGMOID, activate, gate_grad, sigmoid
from ...passes.pool import pair_sums


class Lines(NamedTuple):
    """What kernels know of lines `[N, C, H + W]` and of hidden ones `[N, H + W, M]` when they run."""

    C: Any
    H: Any
    W: Any
    M: Any
    stride_c: Any
    stride_l: Any


@triton.jit
def _block(block, size, BLOCK_L: tl.constexpr):
    """Of one block of an image's lines: whether they are columns, the lines [BLOCK_L], and which are there."""
    of_rows = tl.cdiv(size.H, BLOCK_L)
    columns = block >= of_rows
    line = tl.where(columns, size.H + (block - of_rows) * BLOCK_L, block * BLOCK_L) + tl.arange(0, BLOCK_L)
    return columns, line, line < tl.where(columns, size.H + size.W, size.H)


@triton.jit
def _blocks(size, BLOCK_L: tl.constexpr):
    """In an image."""
    return tl.cdiv(size.H, BLOCK_L) + tl.cdiv(size.W, BLOCK_L)


@triton.jit
def _this_block(size, BLOCK_L: tl.constexpr):
    """This program's image (int64), and what `_block` says of its lines."""
    blocks = _blocks(size, BLOCK_L)
    columns, line, there = _block(tl.program_id(0) % blocks, size, BLOCK_L)
    return (tl.program_id(0) // blocks).to(tl.int64), columns, line, there


@triton.jit
def _at_lines(n, line, there, c, size):
    """Offsets in lines, int64, and mask, [BLOCK_L, BLOCK_C]."""
    image = n * size.C * (size.H + size.W)
    offsets = line[:, None].to(tl.int64) * size.stride_l + c[None, :].to(tl.int64) * size.stride_c
    return image + offsets, there[:, None] & (c < size.C)[None, :]


@triton.jit
def _at_hidden(n, line, there, m, size):
    """Offsets in hidden lines, int64, and mask, [BLOCK_L, BLOCK_M]."""
    row = n * (size.H + size.W) + line
    return row[:, None] * size.M + m[None, :], there[:, None] & (m < size.M)[None, :]


@triton.jit
def _weights(w_ptr, o, i, outputs, inputs, acc_ty: tl.constexpr):
    """A tile of w [outputs, inputs] as [inputs, outputs]."""
    offsets = o[None, :].to(tl.int64) * inputs + i[:, None]
    return tl.load(w_ptr + offsets, mask=(o < outputs)[None, :] & (i < inputs)[:, None], other=0.0).to(acc_ty)


@triton.jit
def _vector(ptr, i, size, default, acc_ty: tl.constexpr):
    """Elements i; the default where there is no vector."""
    if ptr is None:
        found = tl.full(i.shape, default, acc_ty)
    else:
        found = tl.load(ptr + i, mask=i < size, other=default).to(acc_ty)
    return found


@triton.jit
def _normed(z, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m, size, EPS: tl.constexpr):
    """The batch norm of z [BLOCK_L, BLOCK_M], without and with its weight and bias, and the factor of z in it."""
    acc_ty: tl.constexpr = z.dtype
    inverse = 1 / tl.sqrt(_vector(var_ptr, m, size.M, 1.0, acc_ty) + EPS)
    normal = (z - _vector(mean_ptr, m, size.M, 0.0, acc_ty)[None, :]) * inverse[None, :]
    weight = _vector(bn_weight_ptr, m, size.M, 1.0, acc_ty)
    affine = normal * weight[None, :] + _vector(bn_bias_ptr, m, size.M, 0.0, acc_ty)[None, :]
    return normal, affine, inverse * weight


@triton.jit
def _hard_swish(v):
    return v * activate(v, HARD_SIGMOID)


@triton.jit
def _hard_swish_grad(g, v):
    return tl.where(v <= -3, 0.0, tl.where(v < 3, g * (v / 3 + 0.5), g))


@triton.jit
def _store_part(parts_ptr, a, b, m, size):
    """This program's part of two vectors, parts [programs, 2, M]."""
    parts_ptr += tl.program_id(0).to(tl.int64) * 2 * size.M + m
    tl.store(parts_ptr, a, mask=m < size.M)
    tl.store(parts_ptr + size.M, b, mask=m < size.M)


@triton.jit
def _hidden_kernel(
    means_ptr, w1_ptr, b1_ptr, z_ptr, parts_ptr, size, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """z = w1 means + b1 [N, L, M], and with parts of each program's lines their mean and squared deviations from it."""
    acc_ty = z_ptr.dtype.element_ty
    n, _columns, line, there = _this_block(size, BLOCK_L)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    z = tl.zeros([BLOCK_L, BLOCK_M], acc_ty)
    for start in range(0, size.C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        offsets, mask = _at_lines(n, line, there, c, size)
        means = tl.load(means_ptr + offsets, mask=mask, other=0.0)
        z = dot(means, _weights(w1_ptr, m, c, size.M, size.C, acc_ty), z, acc_ty, "ieee")
    z += _vector(b1_ptr, m, size.M, 0.0, acc_ty)[None, :]
    offsets, mask = _at_hidden(n, line, there, m, size)
    tl.store(z_ptr + offsets, z, mask=mask)
    if parts_ptr is not None:
        first = tl.sum(tl.where((tl.arange(0, BLOCK_L) == 0)[:, None], z, 0.0), 0)
        first = tl.where(tl.abs(first) < float("inf"), first, 0.0)  # of equal lines the differences are 0
        count = tl.sum(there.to(acc_ty), 0)
        mean = first + tl.sum(tl.where(there[:, None], z - first[None, :], 0.0), 0) / count
        apart = tl.where(there[:, None], z - mean[None, :], 0.0)
        _store_part(parts_ptr, mean, tl.sum(apart * apart, 0), m, size)


@triton.jit
def _statistics_kernel(
    parts_ptr, mean_ptr, var_ptr, rows, count, size, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """mean and var [M] of all lines from parts [rows, 2, M], in order."""
    acc_ty = mean_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.load(parts_ptr + m, mask=m < size.M, other=0.0)
    first = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    total = tl.zeros([BLOCK_S, BLOCK_M], acc_ty)
    for start in range(0, rows, BLOCK_S):
        lines, at, mask = _part_rows(parts_ptr, start, rows, m, size, BLOCK_L, BLOCK_S)
        total += lines * tl.where(mask, tl.load(at, mask=mask, other=0.0) - first[None, :], 0.0)
    mean = first + tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_S, BLOCK_M], acc_ty)
    for start in range(0, rows, BLOCK_S):
        lines, at, mask = _part_rows(parts_ptr, start, rows, m, size, BLOCK_L, BLOCK_S)
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        total += tl.load(at + size.M, mask=mask, other=0.0) + lines * apart * apart
    tl.store(mean_ptr + m, mean, mask=m < size.M)
    tl.store(var_ptr + m, tl.sum(total, 0) / count, mask=m < size.M)


@triton.jit
def _part_rows(parts_ptr, start, rows, m, size, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many lines rows of parts are of [BLOCK_S, 1], where the first vectors lie, and mask, [BLOCK_S, BLOCK_M]."""
    row = start + tl.arange(0, BLOCK_S)
    block, of_rows = row % _blocks(size, BLOCK_L), tl.cdiv(size.H, BLOCK_L)
    left = tl.where(block < of_rows, size.H - block * BLOCK_L, size.W - (block - of_rows) * BLOCK_L)
    lines = tl.minimum(left, BLOCK_L).to(parts_ptr.dtype.element_ty)
    at = parts_ptr + row[:, None].to(tl.int64) * 2 * size.M + m[None, :]
    return lines[:, None], at, (row < rows)[:, None] & (m < size.M)[None, :]


@triton.jit
def _gates_kernel(
    z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, w_h_ptr, b_h_ptr, w_w_ptr, b_w_ptr, gates_ptr, size,
    EPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """gates = sigmoid(w hardswish(bn(z)) + b) [N, C, L], w and b those of rows or of columns."""
    acc_ty = gates_ptr.dtype.element_ty
    n, columns, line, there = _this_block(size, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_L, BLOCK_C], acc_ty)
    for start in range(0, size.M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        offsets, mask = _at_hidden(n, line, there, m, size)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
        _, affine, _ = _normed(z, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m, size, EPS)
        hidden = tl.where(mask, _hard_swish(affine), 0.0)
        if columns:
            w = _weights(w_w_ptr, c, m, size.C, size.M, acc_ty)
        else:
            w = _weights(w_h_ptr, c, m, size.C, size.M, acc_ty)
        acc = dot(hidden, w, acc, acc_ty, "ieee")
    if columns:
        acc += _vector(b_w_ptr, c, size.C, 0.0, acc_ty)[None, :]
    else:
        acc += _vector(b_h_ptr, c, size.C, 0.0, acc_ty)[None, :]
    offsets, mask = _at_lines(n, line, there, c, size)
    tl.store(gates_ptr + offsets, sigmoid(acc), mask=mask)


@triton.jit
def _logit_grads(dgates_ptr, gates_ptr, n, line, there, c, size):
    """The gradients before the sigmoid, [BLOCK_L, BLOCK_C]."""
    offsets, mask = _at_lines(n, line, there, c, size)
    gates = tl.load(gates_ptr + offsets, mask=mask, other=0.0)
    return tl.load(dgates_ptr + offsets, mask=mask, other=0.0) * gate_grad(gates, SIGMOID)


@triton.jit
def _line_hidden_grads_kernel(
    dgates_ptr, gates_ptr, z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, w_h_ptr, w_w_ptr, daffine_ptr,
    parts_ptr, size, EPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """daffine [N, L, M], before the hardswish, and of each program's lines the sums of it, and of it by normal."""
    acc_ty = daffine_ptr.dtype.element_ty
    n, columns, line, there = _this_block(size, BLOCK_L)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_L, BLOCK_M], acc_ty)
    for start in range(0, size.C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        if columns:
            w = tl.trans(_weights(w_w_ptr, c, m, size.C, size.M, acc_ty))
        else:
            w = tl.trans(_weights(w_h_ptr, c, m, size.C, size.M, acc_ty))
        acc = dot(_logit_grads(dgates_ptr, gates_ptr, n, line, there, c, size), w, acc, acc_ty, "ieee")
    offsets, mask = _at_hidden(n, line, there, m, size)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
    normal, affine, _ = _normed(z, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m, size, EPS)
    daffine = tl.where(mask, _hard_swish_grad(acc, affine), 0.0)
    tl.store(daffine_ptr + offsets, daffine, mask=mask)
    _store_part(parts_ptr, tl.sum(daffine, 0), tl.sum(tl.where(mask, daffine * normal, 0.0), 0), m, size)


@triton.jit
def _norm_grads_kernel(
    parts_ptr, var_ptr, bn_weight_ptr, sums_ptr, rows, size, EPS: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sums [3, M]: the gradients of the norm's bias and weight, sums of parts in order, and of b1."""
    acc_ty = sums_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dbias, dweight = pair_sums(parts_ptr, m, size.M, rows, BLOCK_S)
    tl.store(sums_ptr + m, dbias, mask=m < size.M)
    tl.store(sums_ptr + size.M + m, dweight, mask=m < size.M)
    db1 = tl.zeros([BLOCK_M], acc_ty)  # the batch's mean takes it out
    if FIXED:
        inverse = 1 / tl.sqrt(_vector(var_ptr, m, size.M, 1.0, acc_ty) + EPS)
        db1 = dbias * inverse * _vector(bn_weight_ptr, m, size.M, 1.0, acc_ty)
    tl.store(sums_ptr + 2 * size.M + m, db1, mask=m < size.M)


@triton.jit
def _z_grads(
    daffine_ptr, z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, sums_ptr, n, line, there, m, count, size,
    EPS: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """The gradients of z, and hidden, [BLOCK_L, BLOCK_M]."""
    offsets, mask = _at_hidden(n, line, there, m, size)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
    normal, affine, gain = _normed(z, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, m, size, EPS)
    dz = tl.load(daffine_ptr + offsets, mask=mask, other=0.0)
    if not FIXED:
        dbias = _vector(sums_ptr, m, size.M, 0.0, z.dtype)
        dweight = _vector(sums_ptr + size.M, m, size.M, 0.0, z.dtype)
        dz -= (dbias[None, :] + normal * dweight[None, :]) / count
    return tl.where(mask, dz * gain[None, :], 0.0), tl.where(mask, _hard_swish(affine), 0.0)


@triton.jit
def _mean_grads_kernel(
    daffine_ptr, z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, sums_ptr, w1_ptr, dmeans_ptr, count, size,
    EPS: tl.constexpr, FIXED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dmeans [N, C, L]."""
    acc_ty = dmeans_ptr.dtype.element_ty
    n, _columns, line, there = _this_block(size, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_L, BLOCK_C], acc_ty)
    for start in range(0, size.M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        dz, _ = _z_grads(
            daffine_ptr, z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, sums_ptr, n, line, there, m, count,
            size, EPS, FIXED,
        )  # fmt: skip
        acc = dot(dz, tl.trans(_weights(w1_ptr, m, c, size.M, size.C, acc_ty)), acc, acc_ty, "ieee")
    offsets, mask = _at_lines(n, line, there, c, size)
    tl.store(dmeans_ptr + offsets, acc, mask=mask)


@triton.jit
def _weight_parts_kernel(
    dgates_ptr, gates_ptr, means_ptr, daffine_ptr, z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, sums_ptr,
    parts_ptr, N, count, size, EPS: tl.constexpr, FIXED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """parts [programs, 3 C M + 2 C]: of a share of all blocks dw_h and dw_w [C, M], dw1 [M, C], db_h and db_w [C]."""
    acc_ty = parts_ptr.dtype.element_ty
    blocks_c = tl.cdiv(size.C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(0) // blocks_c * BLOCK_M + tl.arange(0, BLOCK_M)
    weights = size.C * size.M
    parts_ptr += tl.program_id(1).to(tl.int64) * (3 * weights + 2 * size.C)
    mask = (c < size.C)[:, None] & (m < size.M)[None, :]
    dw1 = tl.zeros([BLOCK_C, BLOCK_M], acc_ty)
    of_rows, blocks = tl.cdiv(size.H, BLOCK_L), _blocks(size, BLOCK_L)
    for axis in tl.static_range(2):
        begin = of_rows if axis else 0
        met = blocks - of_rows if axis else of_rows
        dw = tl.zeros([BLOCK_C, BLOCK_M], acc_ty)
        db = tl.zeros([BLOCK_C], acc_ty)
        share = tl.cdiv(N * met, tl.num_programs(1))
        first = tl.program_id(1) * share
        for step in range(first, tl.minimum(first + share, N * met)):
            n = (step // met).to(tl.int64)
            _, line, there = _block(begin + step % met, size, BLOCK_L)
            dlogits = _logit_grads(dgates_ptr, gates_ptr, n, line, there, c, size)
            dz, hidden = _z_grads(
                daffine_ptr, z_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, sums_ptr, n, line, there, m,
                count, size, EPS, FIXED,
            )  # fmt: skip
            offsets, lines_mask = _at_lines(n, line, there, c, size)
            means = tl.load(means_ptr + offsets, mask=lines_mask, other=0.0)
            dw = dot(tl.trans(dlogits), hidden, dw, acc_ty, "ieee")
            dw1 = dot(tl.trans(means), dz, dw1, acc_ty, "ieee")
            db += tl.sum(dlogits, 0)
        tl.store(parts_ptr + axis * weights + c[:, None] * size.M + m[None, :], dw, mask=mask)
        in_first = (c < size.C) & (tl.program_id(0) < blocks_c)
        tl.store(parts_ptr + 3 * weights + axis * size.C + c, db, mask=in_first)
    tl.store(parts_ptr + 2 * weights + m[None, :] * size.C + c[:, None], dw1, mask=mask)


@triton.jit
def _line_weight_grads_kernel(
    parts_ptr, dw_h_ptr, dw_w_ptr, dw1_ptr, db_h_ptr, db_w_ptr, parts, size, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of `_weight_parts_kernel`'s parts, in order, each in its gradient's dtype."""
    weights = size.C * size.M
    length = 3 * weights + 2 * size.C
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], parts_ptr.dtype.element_ty)
    for part in tl.range(0, parts, loop_unroll_factor=4):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * length + k, mask=k < length, other=0.0)
    tl.store(dw_h_ptr + k, total, mask=k < weights)
    tl.store(dw_w_ptr + k - weights, total, mask=(k >= weights) & (k < 2 * weights))
    tl.store(dw1_ptr + k - 2 * weights, total, mask=(k >= 2 * weights) & (k < 3 * weights))
    k -= 3 * weights
    tl.store(db_h_ptr + k, total, mask=(k >= 0) & (k < size.C))
    tl.store(db_w_ptr + k - size.C, total, mask=(k >= size.C) & (k < 2 * size.C))
