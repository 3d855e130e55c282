"""S2-MLPv2's split attention: three branches in one map [N, 3C, H, W], the first two shifted as they are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import Reduction, Tile, reduction, tile, tiles
from ..core.launch import device_guard, launch
from ..core.layout import Layout, accumulation_dtype, canonical
from ..core.tiles import program_tile, tile_mask, tile_offsets
from ..passes.pool import combine

BRANCHES = 3


@triton.jit
def _step(c, C, BRANCH: tl.constexpr):
    """(dh, dw), [BLOCK_C, 1] each, from a pixel to the one whose value comes to it: -1, 1 along H, then along W, for

    the quarters of branch 0; W first in branch 1; none in branch 2.
    """
    QUARTER = C // 4
    even = (c < QUARTER) | ((c >= 2 * QUARTER) & (c < 3 * QUARTER))
    step = tl.where(even, -1, 1)[:, None]
    along_h = ((c < 2 * QUARTER) if BRANCH == 0 else (c >= 2 * QUARTER))[:, None]
    return tl.where(along_h, step, 0), tl.where(along_h, 0, step)


@triton.jit
def _offsets(c, p, stride_c, stride_p, RUN: tl.constexpr):
    """Of pixels p [BLOCK_C or 1, BLOCK_P], int64. RUN neighbouring channels move alike, and lie side by side."""
    offsets = c[:, None].to(tl.int64) * stride_c + p.to(tl.int64) * stride_p
    return offsets if RUN == 1 else tl.max_contiguous(tl.multiple_of(offsets, [RUN, 1]), [RUN, 1])


@triton.jit
def _branch(u_ptr, c, p, mask, C, H, W, stride_c, stride_p, BRANCH: tl.constexpr, RUN: tl.constexpr):
    """Values of a shifted branch, in u's dtype: a neighbour's, or at the border the pixel's own."""
    dh, dw = _step(c, C, BRANCH)
    h = tl.minimum(tl.maximum((p // W)[None, :] + dh, 0), H - 1)
    w = tl.minimum(tl.maximum((p % W)[None, :] + dw, 0), W - 1)
    offsets = _offsets(BRANCH * C + c, h * W + w, stride_c, stride_p, RUN)
    return tl.load(u_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _shift_sums_kernel(
    grad_ptr, u_ptr, parts_ptr, C, HW, H, W, stride_n, stride_c, stride_p, steps, RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums over parts of the pixels: of the three branches, [N, parts, C]; or, with a grad, of its product with

    each, [N, parts, 3, C].
    """
    acc_ty: tl.constexpr = parts_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    part = tl.program_id(1)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    u_ptr += tl.multiple_of(n * stride_n, RUN)
    first = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    second = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    third = tl.zeros([BLOCK_C, BLOCK_P], acc_ty)
    for step in range(steps):
        p = (part * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
        b1 = _branch(u_ptr, c, p, mask, C, H, W, stride_c, stride_p, 0, RUN).to(acc_ty)
        b2 = _branch(u_ptr, c, p, mask, C, H, W, stride_c, stride_p, 1, RUN).to(acc_ty)
        own = _offsets(2 * C + c, p[None, :], stride_c, stride_p, 1)
        b3 = tl.load(u_ptr + own, mask=mask, other=0.0).to(acc_ty)
        if grad_ptr is None:
            first += b1 + b2 + b3
        else:
            offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            first += g * b1
            second += g * b2
            third += g * b3
    row = n * tl.num_programs(1) + part
    if grad_ptr is None:
        tl.store(parts_ptr + row * C + c, tl.sum(first, 1), mask=c < C)
    else:
        tl.store(parts_ptr + row * 3 * C + c, tl.sum(first, 1), mask=c < C)
        tl.store(parts_ptr + (row * 3 + 1) * C + c, tl.sum(second, 1), mask=c < C)
        tl.store(parts_ptr + (row * 3 + 2) * C + c, tl.sum(third, 1), mask=c < C)


@triton.jit
def _shift_sum_kernel(
    u_ptr, gate_ptr, y_ptr, C, HW, H, W, stride_n, stride_c, stride_p, RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = the sum over branches of gate [N, 3, C] * branch."""
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    u_ptr += tl.multiple_of(n * stride_n, RUN)
    gate_ptr += n * 3 * C + c
    own = _offsets(2 * C + c, p[None, :], stride_c, stride_p, 1)
    y = tl.load(u_ptr + own, mask=mask, other=0.0).to(acc_ty)
    y *= tl.load(gate_ptr + 2 * C, mask=c < C, other=0.0)[:, None]
    for branch in tl.static_range(2):
        b = _branch(u_ptr, c, p, mask, C, H, W, stride_c, stride_p, branch, RUN).to(acc_ty)
        y += b * tl.load(gate_ptr + branch * C, mask=c < C, other=0.0)[:, None]
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit
def _shift_grad_kernel(
    grad_ptr, edge_ptr, gate_ptr, dtotal_ptr, du_ptr, C, HW, H, W, RUN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """du: what each pixel sends back, grad * gate + dtotal for each branch, goes to where its value came from.

    A shift that repeats one border uses it twice, and never the opposite one. So that every element of du is written
    once, the pixel next to the repeated border adds what the border pixel sends, read from edge_ptr, which is grad;
    and the border pixel writes the zero on the opposite side.
    """
    acc_ty: tl.constexpr = gate_ptr.dtype.element_ty
    n, c, p = program_tile(C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    gate_ptr += n * 3 * C + c
    dtotal = tl.load(dtotal_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
    edge_ptr += tl.multiple_of(n * C * HW, RUN)
    du_ptr += tl.multiple_of(n * 3 * C * HW, RUN)
    stride_c = 1 if CHANNELS_LAST else HW
    stride_p = C if CHANNELS_LAST else 1
    du_stride_p = 3 * C if CHANNELS_LAST else 1
    own, h, w = p[None, :], (p // W)[None, :], (p % W)[None, :]
    for branch in tl.static_range(2):
        gate = tl.load(gate_ptr + branch * C, mask=c < C, other=0.0)[:, None]
        dh, dw = _step(c, C, branch)
        to_h, to_w = h + dh, w + dw
        at_border = (to_h < 0) | (to_h >= H) | (to_w < 0) | (to_w >= W)
        next_h, next_w = to_h + dh, to_w + dw
        beside = ((next_h < 0) | (next_h >= H) | (next_w < 0) | (next_w >= W)) & (at_border == 0)
        to_h = tl.where(to_h < 0, H - 1, tl.where(to_h >= H, 0, to_h))
        to_w = tl.where(to_w < 0, W - 1, tl.where(to_w >= W, 0, to_w))
        to = to_h * W + to_w
        e = tl.load(edge_ptr + _offsets(c, to, stride_c, stride_p, RUN), mask=mask & beside, other=0.0).to(acc_ty)
        d = tl.where(at_border & (to != own), 0.0, g * gate + dtotal) + tl.where(beside, e * gate + dtotal, 0.0)
        tl.store(du_ptr + _offsets(branch * C + c, to, stride_c, du_stride_p, RUN), d, mask=mask)
    d = g * tl.load(gate_ptr + 2 * C, mask=c < C, other=0.0)[:, None] + dtotal
    tl.store(du_ptr + _offsets(2 * C + c, own, stride_c, du_stride_p, 1), d, mask=mask)


class _Map:
    """u, the layout of one of its branches (of y and its gradient, too), and how kernels walk u."""

    def __init__(self, u: torch.Tensor) -> None:
        self.u, self.whole = canonical(u)
        whole, C = self.whole, self.whole.C // BRANCHES
        outer = C if whole.channels_last else whole.HW
        self.layout: Layout = whole._replace(C=C, stride_n=C * whole.HW, stride_o=outer)
        # Neighbours within a quarter share wide accesses; quarters and branches start at multiples of so many.
        bits = C | C // 4 | whole.stride_n | whole.stride_o | 16
        self.run = bits & -bits if whole.channels_last else 1

    @property
    def arguments(self) -> tuple[int, ...]:
        """C, HW, H, W, stride_n, stride_c, stride_p of a kernel that reads u."""
        strides = (1, self.whole.stride_o) if self.whole.channels_last else (self.whole.stride_o, 1)
        return self.layout.C, self.layout.HW, self.layout.H, self.layout.W, self.whole.stride_n, *strides

    def tile(self) -> Tile:
        """Small: every element of a shifted branch needs an address of its own."""
        return tile(self.layout, 1024)


def _sums(grad: torch.Tensor | None, m: _Map) -> torch.Tensor:
    """`_shift_sums_kernel` and the sum of its parts in order, [N, C] or [N, 3 C]. Reads u (and grad) once."""
    r: Reduction = reduction(m.layout, over_c=False, elements=1024)
    columns = m.layout.C if grad is None else BRANCHES * m.layout.C
    partial = m.u.new_empty((m.layout.N, r.parts, columns), dtype=accumulation_dtype(m.u))
    launch(
        _shift_sums_kernel, m.layout.N * r.blocks,
        grad, m.u, partial, *m.arguments, r.steps, m.run, **r.tile._asdict(), parts=r.parts,
    )  # fmt: skip
    return combine(partial, None, partial.new_empty((m.layout.N, columns))) if r.parts > 1 else partial[:, 0]


def shift_total(u: torch.Tensor) -> torch.Tensor:
    """Sum over the shifted branches and the pixels, [N, C]. Moves 3 times the bytes of a branch."""
    with device_guard(u):
        return _sums(None, _Map(u))


def shift_sum(u: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Sum over the shifted branches of gate [N, 3, C] * branch. Moves 4 times the bytes of a branch."""
    with device_guard(u):
        m = _Map(u)
        t = m.tile()
        shape = m.layout.N, m.layout.C, m.layout.H, m.layout.W
        y = torch.empty(shape, dtype=u.dtype, device=u.device, memory_format=m.layout.memory_format)
        launch(_shift_sum_kernel, tiles(m.layout, t), m.u, gate, y, *m.arguments, m.run, **t._asdict())
        return y


def shift_dot(grad: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """dgate [N, 3, C]: sums over the pixels of grad * branch. Moves 4 times the bytes of a branch."""
    with device_guard(u):
        m = _Map(u)
        return _sums(m.layout.dense(grad), m).view(m.layout.N, BRANCHES, m.layout.C)


def shift_grad(grad: torch.Tensor, u: torch.Tensor, gate: torch.Tensor, dtotal: torch.Tensor) -> torch.Tensor:
    """du [N, 3C, H, W], like u (whose values are not read). Moves 4 times the bytes of a branch, and its border."""
    with device_guard(u):
        m = _Map(u)
        grad, du, t = m.layout.dense(grad), m.whole.empty(m.u), m.tile()
        # The border is read again, element by element, and seen in a shape of its own: it is no stream.
        launch(
            _shift_grad_kernel, tiles(m.layout, t), grad, grad.flatten(2), gate, dtotal, du,
            m.layout.C, m.layout.HW, m.layout.H, m.layout.W, m.run, **t._asdict(),
        )  # fmt: skip
        return du
