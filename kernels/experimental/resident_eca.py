"""Efficient channel attention by kernels that keep an image on the chip: launchers with the ops' signatures."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import SIGMOID, sigmoid
from ..core.heuristics import registers_for
from ..core.launch import device_guard, launch
from ..core.layout import accumulation_dtype, canonical
from ..core.tiles import bound_if, dense_offsets, tile_mask, x_offsets
from ..ops import eca as streaming
from ..passes.channel_conv import eca_gate_bwd
from ..passes.partials import combine
from .team import Upstream, exchange, join_team, meet, publish_gate_grad, store_scaled, team_of, total


@triton.jit
def _neighbours(sums_ptr, w_ptr, c, C, blocks_p, SIGN: tl.constexpr, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns the sum over taps k of w[k] times the total at c + SIGN (k - K // 2), [BLOCK_C]."""
    acc_ty = sums_ptr.dtype.element_ty
    v = tl.zeros_like(c).to(acc_ty)
    for k in range(K):
        source = c + SIGN * (k - K // 2)
        inside = (c < C) & (source >= 0) & (source < C)
        v += tl.load(w_ptr + k).to(acc_ty) * total(sums_ptr, source, inside, C, blocks_p, BLOCK_S)
    return v


@triton.jit
def _eca_resident_fwd_kernel(
    x_ptr,
    w_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    gate_ptr,
    sums_ptr,
    meet_ptr,
    size,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act(x * gate + residual), gate = sigmoid(conv1d(mean)), and mean, gate; sums are the means of tiles."""
    C = size.C
    acc_ty = mean_ptr.dtype.element_ty
    n, _, block_p, c, p = join_team(meet_ptr, size, TILE)
    blocks_p = tl.cdiv(size.HW, TILE.BLOCK_P)
    mask = tile_mask(c, p, size, TILE)
    x = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0)
    sums_ptr += n * blocks_p * C
    tl.store(sums_ptr + block_p * C + c, tl.sum(x.to(acc_ty), 1) / size.HW, mask=c < C)
    meet(meet_ptr, n, tl.cdiv(C, TILE.BLOCK_C) * blocks_p)

    gate = sigmoid(_neighbours(sums_ptr, w_ptr, c, C, blocks_p, 1, K, BLOCK_S))
    own = c < bound_if(block_p == 0, C)
    tl.store(mean_ptr + n * C + c, total(sums_ptr, c, own, C, blocks_p, BLOCK_S), mask=own)
    tl.store(gate_ptr + n * C + c, gate, mask=own)
    store_scaled(x, gate, residual_ptr, y_ptr, dense_offsets(n, c, p, size, TILE), mask, ACTIVATION)


@triton.jit
def _eca_resident_bwd_kernel(
    upstream,
    w_ptr,
    dx_ptr,
    dz_ptr,
    sums_ptr,
    meet_ptr,
    size,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = g' * gate + dmean / HW, and dz [N, C], the gradient before the sigmoid."""
    C = size.C
    acc_ty = upstream.gate.dtype.element_ty
    blocks_p = tl.cdiv(size.HW, TILE.BLOCK_P)
    n, _, block_p, c, offsets, mask, g, gate, _ = publish_gate_grad(
        upstream, sums_ptr, meet_ptr, size, SIGMOID, ACTIVATION, TILE
    )
    sums_ptr += n * blocks_p * C
    meet(meet_ptr, n, tl.cdiv(C, TILE.BLOCK_C) * blocks_p)

    own = c < bound_if(block_p == 0, C)
    tl.store(dz_ptr + n * C + c, total(sums_ptr, c, own, C, blocks_p, BLOCK_S), mask=own)
    dmean = _neighbours(sums_ptr, w_ptr, c, C, blocks_p, -1, K, BLOCK_S)
    tl.store(dx_ptr + offsets, g.to(acc_ty) * gate[:, None] + (dmean / size.HW)[:, None], mask=mask)


def eca_fwd(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.eca.eca_fwd` in one launch, which reads x once; streams an image that is too large."""
    with device_guard(x):
        x, layout = canonical(x)
        if not (team := team_of(x, layout)):
            return streaming.eca_fwd(x, weight, residual, activation)
        y = layout.empty(x)
        mean = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
        gate = torch.empty_like(mean)
        sums, meet_at = exchange(layout, team, mean)
        launch(
            _eca_resident_fwd_kernel,
            layout.N * team.size,
            x,
            weight.reshape(-1).contiguous(),
            layout.dense_or_none(residual),
            y,
            mean,
            gate,
            sums,
            meet_at,
            layout.sizes,
            K=weight.numel(),
            ACTIVATION=activation,
            BLOCK_S=team.block_s,
            TILE=team.tile,
            num_warps=team.tile.num_warps,
        )
        return y, mean, gate


def eca_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    gate: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.eca.eca_bwd`: the first launch reads grad and x once, two small ones make the weight's gradient."""
    with device_guard(x):
        x, layout = canonical(x)
        if not (team := team_of(x, layout)):
            return streaming.eca_bwd(grad, x, weight, residual, mean, gate, activation)
        dx, dresidual = layout.empty(x), layout.empty_dresidual(x, activation)
        dz = torch.empty_like(gate)
        sums, meet_at = exchange(layout, team, gate)
        residual = layout.dense_or_none(residual if activation else None)
        launch(
            _eca_resident_bwd_kernel,
            layout.N * team.size,
            Upstream(layout.dense(grad), x, residual, gate, dresidual),
            weight.reshape(-1).contiguous(),
            dx,
            dz,
            sums,
            meet_at,
            layout.sizes,
            K=weight.numel(),
            ACTIVATION=activation,
            BLOCK_S=team.block_s,
            TILE=team.tile,
            num_warps=team.tile.num_warps,
            **registers_for(x, team.tile.num_warps),
        )
        dweight = eca_gate_bwd(dz[:, None], None, weight, mean)[1]
        return dx, dresidual, combine(dweight.partials[None], None, dweight.out)
