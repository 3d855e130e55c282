"""Kernels of the passes along H and W.

A plane is seen as `[groups, J]`: a group is G image rows, J = G W elements, as many as it takes for every group to
start aligned. 28 columns of bfloat16 are 56 bytes, two rows 112, a multiple of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...core.tiles import NONE, activate, activation_grad


@triton.jit
def _group(W, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr):
    """J, in nchw as a multiple of ALIGN that the compiler sees."""
    return W if CHANNELS_LAST else W * G // ALIGN * ALIGN


@triton.jit
def _program(pid, C, J, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr):
    """A program's image (int64), block of a group's elements, channels [BLOCK_C] and elements [BLOCK_J]."""
    blocks_j = tl.cdiv(J, BLOCK_J)
    blocks_c = tl.cdiv(C, BLOCK_C)
    block = pid % blocks_j
    c = (pid // blocks_j % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // blocks_j // blocks_c).to(tl.int64), block, c, block * BLOCK_J + tl.arange(0, BLOCK_J)


@triton.jit
def _offsets(image, c, r, j, J, stride_o, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_R, BLOCK_J] of an image, int64; see `tile_offsets`."""
    p = r[None, :, None] * J + j[None, None, :]
    if CHANNELS_LAST:
        offsets = image + (c[:, None, None] + p.to(tl.int64) * stride_o)
    else:
        offsets = image + (c[:, None, None].to(tl.int64) * stride_o + p)
    return offsets if ALIGN == 1 else tl.multiple_of(offsets, [ALIGN, 1, 1] if CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def _mask(c, r, j, C, groups, J, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    mask = (c < C)[:, None, None] & (r < groups)[None, :, None] & (j < J)[None, None, :]
    return mask if ALIGN == 1 else tl.max_constancy(mask, [ALIGN, 1, 1] if CHANNELS_LAST else [1, 1, ALIGN])


@triton.jit
def _line_offsets(c, line, C, L, CHANNELS_LAST: tl.constexpr):
    """Offsets [BLOCK_C, lines] of lines inside an image, int64."""
    if CHANNELS_LAST:
        return c[:, None] + line[None, :].to(tl.int64) * C
    return c[:, None].to(tl.int64) * L + line[None, :]


@triton.jit
def _columns(ptr, c, j, C, H, W, J, CHANNELS_LAST: tl.constexpr, G: tl.constexpr):
    """The columns' values of a group's elements, [BLOCK_C, 1, BLOCK_J]."""
    offsets = _line_offsets(c, H + (j if G == 1 else j % W), C, H + W, CHANNELS_LAST)
    return tl.load(ptr + offsets, mask=(c < C)[:, None] & (j < J)[None, :], other=0.0)[:, None, :]


@triton.jit
def _rows(ptr, c, r, j, C, H, W, CHANNELS_LAST: tl.constexpr, G: tl.constexpr):
    """The rows' values, [BLOCK_C, BLOCK_R, 1], or for groups of several rows [BLOCK_C, BLOCK_R, BLOCK_J]."""
    mask = (c < C)[:, None] & (r * G < H)[None, :]
    values = tl.load(ptr + _line_offsets(c, r * G, C, H + W, CHANNELS_LAST), mask=mask, other=0.0)[:, :, None]
    for k in tl.static_range(1, G):
        offsets = _line_offsets(c, r * G + k, C, H + W, CHANNELS_LAST)
        later = tl.load(ptr + offsets, mask=mask, other=0.0)[:, :, None]
        values = tl.where((j // W >= k)[None, None, :], later, values)
    return values


@triton.jit
def _sums_kernel(
    x_ptr, grad_ptr, gates_ptr, residual_ptr, dresidual_ptr, out_ptr,
    C, H, W, stride_n, stride_o, slots, steps, row_divisor, column_divisor,
    DENSE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out [N, slots, lines] = sums of x over W and over H, in one read; of g' x times the other axis' gate, with grad.

    g' = grad * act'(x * gates + residual) is stored in dresidual, where there is an activation. A DENSE x has grad's
    addresses, which saves the registers of a second set of them.
    """
    acc_ty = out_ptr.dtype.element_ty
    J = _group(W, CHANNELS_LAST, ALIGN, G)
    groups = H // G
    n, block, c, j = _program(tl.program_id(0), C, J, BLOCK_C, BLOCK_J)
    part = tl.program_id(1)
    if grad_ptr is not None:
        lines = gates_ptr + n * C * (H + W)
        columns = _columns(lines, c, j, C, H, W, J, CHANNELS_LAST, G)
    out = out_ptr + (n * slots + block) * C * (H + W)
    acc = tl.zeros([BLOCK_C, BLOCK_R, BLOCK_J], acc_ty)
    for step in range(steps):
        r = (part * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _mask(c, r, j, C, groups, J, CHANNELS_LAST, ALIGN)
        stride_dense = C if CHANNELS_LAST else groups * J
        offsets = _offsets(n * C * (groups * J), c, r, j, J, stride_dense, CHANNELS_LAST, ALIGN)
        x_offsets = offsets
        if not DENSE:
            x_offsets = _offsets(n * stride_n, c, r, j, J, stride_o, CHANNELS_LAST, ALIGN)
        v = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(acc_ty)
        along = v
        if grad_ptr is not None:
            rows = _rows(lines, c, r, j, C, H, W, CHANNELS_LAST, G)
            if ACTIVATION != NONE:
                z = v * (rows * columns)
                if residual_ptr is not None:
                    z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            if ACTIVATION != NONE:
                g = activation_grad(g, z, ACTIVATION)
                tl.store(dresidual_ptr + offsets, g, mask=mask)
            v *= g
            along = v * columns
            v *= rows
        acc += v
        for k in tl.static_range(G):
            of_row = tl.where((j // W == k)[None, None, :], along, 0.0) if G > 1 else along
            offsets_k = _line_offsets(c, r * G + k, C, H + W, CHANNELS_LAST)
            row_mask = (c < C)[:, None] & (r < groups)[None, :]
            tl.store(out + offsets_k, tl.sum(of_row, 2) / row_divisor, mask=row_mask)
    # Element j of a group belongs to its image row j // W, and that row has a slot of its own.
    first = (n * slots + part * G) * C * (H + W)
    if G == 1:
        offsets = first + _line_offsets(c, H + j, C, H + W, CHANNELS_LAST)
    else:
        in_row = _line_offsets(c, H + j % W, C, H + W, CHANNELS_LAST)
        offsets = first + (j // W).to(tl.int64)[None, :] * C * (H + W) + in_row
    tl.store(out_ptr + offsets, tl.sum(acc, 1) / column_divisor, mask=(c < C)[:, None] & (j < J)[None, :])


@triton.jit
def _combine_lines_kernel(
    parts_ptr, out_ptr, C, H, W, slots, row_slots, column_slots, row_divisor, column_divisor,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = sums of lines' slots, in order, divided."""
    size = C * (H + W)
    blocks = tl.cdiv(size, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_row = i < H * C if CHANNELS_LAST else i % (H + W) < H
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for slot in range(slots):
        mask = (i < size) & (slot < tl.where(is_row, row_slots, column_slots))
        total += tl.load(parts_ptr + (n * slots + slot) * size + i, mask=mask, other=0.0)
    divisor = tl.where(is_row, row_divisor, column_divisor).to(total.dtype)
    tl.store(out_ptr + n * size + i, total / divisor, mask=i < size)


@triton.jit
def _axis_map_kernel(
    v_ptr, gates_ptr, residual_ptr, dmeans_ptr, out_ptr, C, H, W, stride_n, stride_o, steps,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out = act(v * row gate * column gate [+ residual] [+ dmeans of the row / W + dmeans of the column / H]).

    What the sums read last comes first: it may still be in the L2 cache.
    """
    acc_ty = gates_ptr.dtype.element_ty
    J = _group(W, CHANNELS_LAST, ALIGN, G)
    groups = H // G
    n, _, c, j = _program(tl.num_programs(0) - 1 - tl.program_id(0), C, J, BLOCK_C, BLOCK_J)
    part = tl.num_programs(1) - 1 - tl.program_id(1)
    lines = n * C * (H + W)
    columns = _columns(gates_ptr + lines, c, j, C, H, W, J, CHANNELS_LAST, G)
    if dmeans_ptr is not None:
        dcolumns = _columns(dmeans_ptr + lines, c, j, C, H, W, J, CHANNELS_LAST, G) / H
    for step in range(steps):
        r = (part * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = _mask(c, r, j, C, groups, J, CHANNELS_LAST, ALIGN)
        offsets = _offsets(n * C * (groups * J), c, r, j, J, C if CHANNELS_LAST else groups * J, CHANNELS_LAST, ALIGN)
        v_offsets = _offsets(n * stride_n, c, r, j, J, stride_o, CHANNELS_LAST, ALIGN)
        v = tl.load(v_ptr + v_offsets, mask=mask, other=0.0).to(acc_ty)
        v *= _rows(gates_ptr + lines, c, r, j, C, H, W, CHANNELS_LAST, G) * columns
        if residual_ptr is not None:
            v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if dmeans_ptr is not None:
            v += _rows(dmeans_ptr + lines, c, r, j, C, H, W, CHANNELS_LAST, G) / W + dcolumns
        tl.store(out_ptr + offsets, activate(v, ACTIVATION), mask=mask)
