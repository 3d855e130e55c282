"""SE and ECA whose images stay on the chip between pooling and scaling: x is read once.

The programs of a team share an image. Each keeps a tile of it in registers, publishes its part of the sums, waits until
all of the team have, and goes on with their total. They publish and wait in global memory, which the L2 cache holds:
so it is the same on every chip. Clusters (``num_ctas``) would be closer, but cannot exchange sums before Triton 3.8.

Programs take their places in the order in which they start. All that came before a waiting one are running then, and
its team is complete as soon as there is room for it (`heuristics.resident`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core import heuristics
from ..core.heuristics import Team, next_power_of_2, resident
from ..core.launch import multiprocessors
from ..core.layout import Layout
from ..core.tiles import NONE, SIGMOID, activate, activation_grad, gate_grad, sigmoid, tile_mask, tile_offsets


@triton.jit
def _take_place(meet_ptr, C, HW, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's image (int64), number in the team, block of pixels, channels [BLOCK_C] and pixels [BLOCK_P]."""
    blocks_p = tl.cdiv(HW, BLOCK_P)
    team = tl.cdiv(C, BLOCK_C) * blocks_p
    ticket = tl.atomic_add(meet_ptr, 1, sem="relaxed")
    member = ticket % team
    block_p = member % blocks_p
    c = member // blocks_p * BLOCK_C + tl.arange(0, BLOCK_C)
    return (ticket // team).to(tl.int64), member, block_p, c, block_p * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _meet(meet_ptr, n, team):
    """Returns when all of the team have come here, and what they stored before can be loaded."""
    tl.debug_barrier()  # the arrival, which one thread makes, comes after the stores of all
    tl.atomic_add(meet_ptr + 1 + n, 1, sem="release")
    while tl.atomic_add(meet_ptr + 1 + n, 0, sem="acquire") < team:
        pass
    tl.debug_barrier()


@triton.jit
def _total(parts_ptr, k, mask, stride, count, BLOCK_S: tl.constexpr):
    """Sum, in a fixed order, of what ``count`` programs stored at parts + k, ``stride`` apart."""
    s = tl.arange(0, BLOCK_S)
    offsets = s[:, None].to(tl.int64) * stride + k[None, :]
    inside = (s < count)[:, None] & mask[None, :]
    return tl.sum(tl.load(parts_ptr + offsets, mask=inside, other=0.0, cache_modifier=".cg"), 0)


@triton.jit
def _matrix(w_ptr, c, r, C, R, stride_c, stride_r, acc_ty: tl.constexpr):
    """A tile [BLOCK_C, BLOCK_R] of a layer's weights."""
    offsets = c[:, None].to(tl.int64) * stride_c + r[None, :].to(tl.int64) * stride_r
    return tl.load(w_ptr + offsets, mask=(c < C)[:, None] & (r < R)[None, :], other=0.0).to(acc_ty)


@triton.jit
def _publish_layer(w_ptr, parts_ptr, v, c, C, R, stride_c, stride_r, BLOCK_R: tl.constexpr):
    """parts [R] = w v, of this program's channels: its part of the first layer."""
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        w = _matrix(w_ptr, c, r, C, R, stride_c, stride_r, v.dtype)
        tl.store(parts_ptr + r, tl.sum(w * v[:, None], 0), mask=r < R)


@triton.jit
def _neighbours(sums_ptr, w_ptr, c, C, blocks_p, SIGN: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_C] = sum over taps k of w[k] times the total at c + SIGN (k - K // 2)."""
    acc_ty = sums_ptr.dtype.element_ty
    v = tl.zeros_like(c).to(acc_ty)
    for k in range(K):
        source = c + SIGN * (k - K // 2)
        inside = (c < C) & (source >= 0) & (source < C)
        v += tl.load(w_ptr + k).to(acc_ty) * _total(sums_ptr, source, inside, C, blocks_p, BLOCK_S)
    return v


@triton.jit
def _scale(x, gate, residual_ptr, y_ptr, offsets, mask, ACTIVATION: tl.constexpr):
    v = x.to(gate.dtype) * gate[:, None]
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(gate.dtype)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _grads(grad_ptr, x_ptr, residual_ptr, gate, dresidual_ptr, offsets, x_offsets, mask, ACTIVATION: tl.constexpr):
    """g' = grad * act'(z), as it is kept, and its product with x summed over the pixels."""
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(gate.dtype)
    v = g.to(gate.dtype)
    if ACTIVATION != NONE:
        z = x * gate[:, None]
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(gate.dtype)
        v = activation_grad(v, z, ACTIVATION)
        g = v.to(g.dtype)
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    return g, tl.sum(v * x, 1)


@triton.jit
def _publish_gate_grad(
    grad_ptr, x_ptr, residual_ptr, gate_ptr, dresidual_ptr, sums_ptr, meet_ptr, C, HW, stride_n, stride_o,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """This program's place, and of its tile g', the gate and the offsets in dx; stores its part of dz in sums.

    Returns the image, the member, its block of pixels, channels, offsets, mask, g', gate, and its part of dz.
    """
    n, member, block_p, c, p = _take_place(meet_ptr, C, HW, BLOCK_C, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    x_offsets = tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN)
    gate = tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0)
    g, dz = _grads(grad_ptr, x_ptr, residual_ptr, gate, dresidual_ptr, offsets, x_offsets, mask, ACTIVATION)
    dz *= gate_grad(gate, GATE)
    tl.store(sums_ptr + (n * tl.cdiv(HW, BLOCK_P) + block_p) * C + c, dz, mask=c < C)
    return n, member, block_p, c, offsets, mask, g, gate, dz


@triton.jit
def _se_resident_fwd_kernel(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, residual_ptr, y_ptr, mean_ptr, hidden_ptr, gate_ptr, sums_ptr, parts_ptr,
    meet_ptr, C, HW, R, stride_n, stride_o, w1_r, w1_c, w2_c, w2_r,
    KEPT: tl.constexpr, TAKEN: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = act(x * gate + residual), gate = sigmoid(w2 act(w1 mean + b1) + b2), and mean, hidden, gate.

    sums [N, blocks_p, C] and parts [N, team, R] are what the team exchanges: means of tiles, and what the first layer
    makes of them; it is linear, so the parts add up.
    """
    acc_ty = mean_ptr.dtype.element_ty
    n, member, block_p, c, p = _take_place(meet_ptr, C, HW, BLOCK_C, BLOCK_P)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    team = tl.cdiv(C, BLOCK_C) * blocks_p
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    x_offsets = tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
    mean = tl.sum(x.to(acc_ty), 1) / HW
    tl.store(sums_ptr + (n * blocks_p + block_p) * C + c, mean, mask=c < C)
    parts_ptr += n * team * R
    _publish_layer(w1_ptr, parts_ptr + member * R, mean, c, C, R, w1_c, w1_r, BLOCK_R)
    _meet(meet_ptr, n, team)

    z = tl.zeros([BLOCK_C], acc_ty)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = _total(parts_ptr, r, r < R, R, team, BLOCK_T)
        if b1_ptr is not None:
            h += tl.load(b1_ptr + r, mask=r < R, other=0.0).to(acc_ty)
        h = activate(h, KEPT)
        tl.store(hidden_ptr + n * R + r, h, mask=(r < R) & (member == 0))
        w2 = _matrix(w2_ptr, c, r, C, R, w2_c, w2_r, acc_ty)
        z += tl.sum(w2 * tl.where(r < R, activate(h, TAKEN), 0.0)[None, :], 1)
    if b2_ptr is not None:
        z += tl.load(b2_ptr + c, mask=c < C, other=0.0).to(acc_ty)
    gate = activate(z, GATE)
    mine = (c < C) & (block_p == 0)
    tl.store(mean_ptr + n * C + c, _total(sums_ptr + n * blocks_p * C, c, mine, C, blocks_p, BLOCK_S), mask=mine)
    tl.store(gate_ptr + n * C + c, gate, mask=mine)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    _scale(x, gate, residual_ptr, y_ptr, offsets, mask, ACTIVATION)


@triton.jit
def _se_resident_bwd_kernel(
    grad_ptr, x_ptr, w1_ptr, w2_ptr, residual_ptr, hidden_ptr, gate_ptr, dx_ptr, dresidual_ptr, dz_ptr, dhidden_ptr,
    sums_ptr, parts_ptr, meet_ptr, C, HW, R, stride_n, stride_o, w1_r, w1_c, w2_c, w2_r,
    HIDDEN: tl.constexpr, GATE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = g' * gate + dmean / HW, and the gradients before both activations, dz [N, C] and dhidden [N, R]."""
    acc_ty = gate_ptr.dtype.element_ty
    blocks_p = tl.cdiv(HW, BLOCK_P)
    team = tl.cdiv(C, BLOCK_C) * blocks_p
    n, member, block_p, c, offsets, mask, g, gate, dz = _publish_gate_grad(
        grad_ptr, x_ptr, residual_ptr, gate_ptr, dresidual_ptr, sums_ptr, meet_ptr, C, HW, stride_n, stride_o,
        GATE, ACTIVATION, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    parts_ptr += n * team * R
    _publish_layer(w2_ptr, parts_ptr + member * R, dz, c, C, R, w2_c, w2_r, BLOCK_R)
    _meet(meet_ptr, n, team)

    dmean = tl.zeros([BLOCK_C], acc_ty)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h = tl.load(hidden_ptr + n * R + r, mask=r < R, other=0.0)
        dh = activation_grad(_total(parts_ptr, r, r < R, R, team, BLOCK_T), h, HIDDEN)
        tl.store(dhidden_ptr + n * R + r, dh, mask=(r < R) & (member == 0))
        dmean += tl.sum(_matrix(w1_ptr, c, r, C, R, w1_c, w1_r, acc_ty) * dh[None, :], 1)
    mine = (c < C) & (block_p == 0)
    tl.store(dz_ptr + n * C + c, _total(sums_ptr + n * blocks_p * C, c, mine, C, blocks_p, BLOCK_S), mask=mine)
    tl.store(dx_ptr + offsets, g.to(acc_ty) * gate[:, None] + (dmean / HW)[:, None], mask=mask)


@triton.jit
def _eca_resident_fwd_kernel(
    x_ptr, w_ptr, residual_ptr, y_ptr, mean_ptr, gate_ptr, sums_ptr, meet_ptr, C, HW, stride_n, stride_o,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = act(x * gate + residual), gate = sigmoid(conv1d(mean)), and mean, gate; sums are the means of tiles."""
    acc_ty = mean_ptr.dtype.element_ty
    n, _, block_p, c, p = _take_place(meet_ptr, C, HW, BLOCK_C, BLOCK_P)
    blocks_p = tl.cdiv(HW, BLOCK_P)
    mask = tile_mask(c, p, C, HW, CHANNELS_LAST, ALIGN)
    x_offsets = tile_offsets(n * stride_n, c, p, stride_o, CHANNELS_LAST, ALIGN)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
    sums_ptr += n * blocks_p * C
    tl.store(sums_ptr + block_p * C + c, tl.sum(x.to(acc_ty), 1) / HW, mask=c < C)
    _meet(meet_ptr, n, tl.cdiv(C, BLOCK_C) * blocks_p)

    gate = sigmoid(_neighbours(sums_ptr, w_ptr, c, C, blocks_p, 1, K, BLOCK_S))
    mine = (c < C) & (block_p == 0)
    tl.store(mean_ptr + n * C + c, _total(sums_ptr, c, mine, C, blocks_p, BLOCK_S), mask=mine)
    tl.store(gate_ptr + n * C + c, gate, mask=mine)
    offsets = tile_offsets(n * C * HW, c, p, C if CHANNELS_LAST else HW, CHANNELS_LAST, ALIGN)
    _scale(x, gate, residual_ptr, y_ptr, offsets, mask, ACTIVATION)


@triton.jit
def _eca_resident_bwd_kernel(
    grad_ptr, x_ptr, w_ptr, residual_ptr, gate_ptr, dx_ptr, dresidual_ptr, dz_ptr, sums_ptr, meet_ptr,
    C, HW, stride_n, stride_o, K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = g' * gate + dmean / HW, and dz [N, C], the gradient before the sigmoid."""
    acc_ty = gate_ptr.dtype.element_ty
    blocks_p = tl.cdiv(HW, BLOCK_P)
    n, _, block_p, c, offsets, mask, g, gate, _ = _publish_gate_grad(
        grad_ptr, x_ptr, residual_ptr, gate_ptr, dresidual_ptr, sums_ptr, meet_ptr, C, HW, stride_n, stride_o,
        SIGMOID, ACTIVATION, CHANNELS_LAST, ALIGN, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    sums_ptr += n * blocks_p * C
    _meet(meet_ptr, n, tl.cdiv(C, BLOCK_C) * blocks_p)

    mine = (c < C) & (block_p == 0)
    tl.store(dz_ptr + n * C + c, _total(sums_ptr, c, mine, C, blocks_p, BLOCK_S), mask=mine)
    dmean = _neighbours(sums_ptr, w_ptr, c, C, blocks_p, -1, K, BLOCK_S)
    tl.store(dx_ptr + offsets, g.to(acc_ty) * gate[:, None] + (dmean / HW)[:, None], mask=mask)


def team_of(x: torch.Tensor, layout: Layout) -> Team | None:
    """The programs that keep an image of x on the chip; None where x is streamed."""
    if not heuristics.RESIDENT or not layout.N or x.is_xpu:
        return None
    return resident(layout, x.element_size(), multiprocessors(x.device))


def exchange(layout: Layout, team: Team, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a team stores its sums in [N, blocks_p, C], like small, and what it meets at, zeros."""
    sums = small.new_empty((layout.N, team.blocks_p, layout.C))
    return sums, small.new_zeros(1 + layout.N, dtype=torch.int32)


def blocks(team: Team, hidden: int = 0) -> dict[str, Any]:
    """What the kernels take as keywords, those of SE with its hidden units."""
    found = {**team.tile._asdict(), "BLOCK_S": next_power_of_2(team.blocks_p)}
    if hidden:
        found["BLOCK_T"] = next_power_of_2(team.size)
        found["BLOCK_R"] = min(next_power_of_2(hidden), max(2048 // team.tile.BLOCK_C, 1))
    return found
