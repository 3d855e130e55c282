"""Squeeze-and-excitation by kernels that keep an image on the chip: launchers with the ops' signatures."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import GATE_ACTIVATIONS, activate, activation_grad
from ..core.heuristics import next_power_of_2
from ..core.launch import device_guard, launch
from ..core.layout import accumulation_dtype, canonical
from ..core.tiles import bound_if, dense_offsets, tile_mask, x_offsets
from ..ops import se as streaming
from ..passes.mlp import MLPWeights, saved_and_applied
from ..passes.weight_grads import empty_mlp_grads, mlp_grads
from .team import Team, Upstream, exchange, join_team, meet, publish_gate_grad, store_scaled, team_of, total


class MLPStrides(NamedTuple):
    """The strides of w1 [R, C] and w2 [C, R], as kernels take them."""

    w1_r: Any
    w1_c: Any
    w2_c: Any
    w2_r: Any


class SmallResults(NamedTuple):
    """mean [N, C], hidden [N, R] and gate [N, C], as kernels take them."""

    mean: Any
    hidden: Any
    gate: Any


class Published(NamedTuple):
    """The team's sums of tiles, [N, blocks_p, C], and its shares of the layer behind them, [N, team, R]."""

    sums: Any
    shares: Any


class Blocks(NamedTuple):
    """Hidden units at once, and blocks of sums over the team and over its blocks of pixels; the kernels' ``BLOCKS``."""

    R: int
    T: int
    S: int


@triton.jit
def _load_weights(w_ptr, c, r, C, R, stride_c, stride_r, acc_ty: tl.constexpr):
    """Returns a tile [BLOCK_C, BLOCK_R] of a layer's weights."""
    offsets = c[:, None].to(tl.int64) * stride_c + r[None, :].to(tl.int64) * stride_r
    return tl.load(w_ptr + offsets, mask=(c < C)[:, None] & (r < R)[None, :], other=0.0).to(acc_ty)


@triton.jit
def _publish_layer(w_ptr, shares_ptr, v, c, C, R, stride_c, stride_r, BLOCK_R: tl.constexpr):
    """shares [R] = w v, of this program's channels: its share of the layer, which is linear."""
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        w = _load_weights(w_ptr, c, r, C, R, stride_c, stride_r, v.dtype)
        tl.store(shares_ptr + r, tl.sum(w * v[:, None], 0), mask=r < R)


@triton.jit
def _se_resident_fwd_kernel(
    x_ptr,
    weights,
    strides,
    residual_ptr,
    y_ptr,
    results,
    published,
    meet_ptr,
    size,
    R,
    SAVED_ACTIVATION: tl.constexpr,
    APPLIED_ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """y = act(x * gate + residual), gate = sigmoid(w2 act(w1 mean + b1) + b2), and mean, hidden, gate.

    The team exchanges means of tiles, and their shares of the first layer.
    """
    C, HW = size.C, size.HW
    acc_ty = results.mean.dtype.element_ty
    n, member, block_p, c, p = join_team(meet_ptr, size, TILE)
    blocks_p = tl.cdiv(HW, TILE.BLOCK_P)
    team = tl.cdiv(C, TILE.BLOCK_C) * blocks_p
    mask = tile_mask(c, p, size, TILE)
    x = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0)
    mean = tl.sum(x.to(acc_ty), 1) / HW
    tl.store(published.sums + (n * blocks_p + block_p) * C + c, mean, mask=c < C)
    shares = published.shares + n * team * R
    _publish_layer(weights.w1, shares + member * R, mean, c, C, R, strides.w1_c, strides.w1_r, BLOCKS.R)
    meet(meet_ptr, n, team)

    z = tl.zeros(c.shape, acc_ty)
    for start in range(0, R, BLOCKS.R):
        r = start + tl.arange(0, BLOCKS.R)
        h = total(shares, r, r < R, R, team, BLOCKS.T)
        if weights.b1 is not None:
            h += tl.load(weights.b1 + r, mask=r < R, other=0.0).to(acc_ty)
        h = activate(h, SAVED_ACTIVATION)
        tl.store(results.hidden + n * R + r, h, mask=r < bound_if(member == 0, R))
        w2 = _load_weights(weights.w2, c, r, C, R, strides.w2_c, strides.w2_r, acc_ty)
        z += tl.sum(w2 * tl.where(r < R, activate(h, APPLIED_ACTIVATION), 0.0)[None, :], 1)
    if weights.b2 is not None:
        z += tl.load(weights.b2 + c, mask=c < C, other=0.0).to(acc_ty)
    gate = activate(z, GATE_ACTIVATION)
    own = c < bound_if(block_p == 0, C)
    mean = total(published.sums + n * blocks_p * C, c, own, C, blocks_p, BLOCKS.S)
    tl.store(results.mean + n * C + c, mean, mask=own)
    tl.store(results.gate + n * C + c, gate, mask=own)
    store_scaled(x, gate, residual_ptr, y_ptr, dense_offsets(n, c, p, size, TILE), mask, ACTIVATION)


@triton.jit
def _se_resident_bwd_kernel(
    upstream,
    weights,
    strides,
    hidden_ptr,
    dx_ptr,
    dz_ptr,
    dhidden_ptr,
    published,
    meet_ptr,
    size,
    R,
    HIDDEN_ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = g' * gate + dmean / HW, and the gradients before both activations, dz [N, C] and dhidden [N, R]."""
    C, HW = size.C, size.HW
    acc_ty = upstream.gate.dtype.element_ty
    blocks_p = tl.cdiv(HW, TILE.BLOCK_P)
    team = tl.cdiv(C, TILE.BLOCK_C) * blocks_p
    n, member, block_p, c, offsets, mask, g, gate, dz = publish_gate_grad(
        upstream, published.sums, meet_ptr, size, GATE_ACTIVATION, ACTIVATION, TILE
    )
    shares = published.shares + n * team * R
    _publish_layer(weights.w2, shares + member * R, dz, c, C, R, strides.w2_c, strides.w2_r, BLOCKS.R)
    meet(meet_ptr, n, team)

    dmean = tl.zeros(c.shape, acc_ty)
    for start in range(0, R, BLOCKS.R):
        r = start + tl.arange(0, BLOCKS.R)
        h = tl.load(hidden_ptr + n * R + r, mask=r < R, other=0.0)
        dh = activation_grad(total(shares, r, r < R, R, team, BLOCKS.T), h, HIDDEN_ACTIVATION)
        tl.store(dhidden_ptr + n * R + r, dh, mask=r < bound_if(member == 0, R))
        w1 = _load_weights(weights.w1, c, r, C, R, strides.w1_c, strides.w1_r, acc_ty)
        dmean += tl.sum(w1 * dh[None, :], 1)
    own = c < bound_if(block_p == 0, C)
    dz = total(published.sums + n * blocks_p * C, c, own, C, blocks_p, BLOCKS.S)
    tl.store(dz_ptr + n * C + c, dz, mask=own)
    tl.store(dx_ptr + offsets, g.to(acc_ty) * gate[:, None] + (dmean / HW)[:, None], mask=mask)


@triton.jit(do_not_specialize=["N"])
def _mlp_grads_kernel(mlp, N, MLP: tl.constexpr):
    """The gradients of an MLP's weights in a launch of their own."""
    mlp_grads(tl.program_id(0), mlp, N, MLP, 8)


def _blocks(team: Team, R: int) -> Blocks:
    block_r = min(next_power_of_2(R), max(2048 // team.tile.BLOCK_C, 1))
    return Blocks(block_r, next_power_of_2(team.size), team.block_s)


def se_fwd(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    hidden_activation: int,
    gate_activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`ops.se.se_fwd` in one launch, which reads x once; streams an image that is too large."""
    with device_guard(x):
        x, layout = canonical(x)
        if not (team := team_of(x, layout)):
            return streaming.se_fwd(x, w1, b1, w2, b2, residual, activation, hidden_activation, gate_activation)
        N, R = layout.N, w1.shape[0]
        y = layout.empty(x)
        mean = x.new_empty((N, layout.C), dtype=accumulation_dtype(x))
        gate, hidden = torch.empty_like(mean), mean.new_empty((N, R))
        sums, meet_at = exchange(layout, team, mean)
        saved, applied = saved_and_applied(hidden_activation)
        launch(
            _se_resident_fwd_kernel,
            N * team.size,
            x,
            MLPWeights(w1, b1, w2, b2),
            MLPStrides(*w1.stride()[:2], *w2.stride()[:2]),
            layout.dense_or_none(residual),
            y,
            SmallResults(mean, hidden, gate),
            Published(sums, mean.new_empty((N, team.size, R))),
            meet_at,
            layout.sizes,
            R,
            SAVED_ACTIVATION=saved,
            APPLIED_ACTIVATION=applied,
            GATE_ACTIVATION=GATE_ACTIVATIONS[gate_activation],
            ACTIVATION=activation,
            BLOCKS=_blocks(team, R),
            TILE=team.tile,
            num_warps=team.tile.num_warps,
        )
        return y, mean, hidden, gate


def se_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    hidden: torch.Tensor,
    gate: torch.Tensor,
    activation: int,
    hidden_activation: int,
    gate_activation: int,
) -> tuple[torch.Tensor, ...]:
    """`ops.se.se_bwd` in two launches: the first reads grad and x once, the second makes the weights' gradients."""
    with device_guard(x):
        x, layout = canonical(x)
        if not (team := team_of(x, layout)):
            return streaming.se_bwd(
                grad, x, w1, w2, residual, mean, hidden, gate, activation, hidden_activation, gate_activation
            )
        R = w1.shape[0]
        dx, dresidual = layout.empty(x), layout.empty_dresidual(x, activation)
        dz, dhidden = torch.empty_like(gate), torch.empty_like(hidden)
        sums, meet_at = exchange(layout, team, gate)
        residual = layout.dense_or_none(residual if activation else None)
        launch(
            _se_resident_bwd_kernel,
            layout.N * team.size,
            Upstream(layout.dense(grad), x, residual, gate, dresidual),
            MLPWeights(w1, None, w2, None),
            MLPStrides(*w1.stride()[:2], *w2.stride()[:2]),
            hidden,
            dx,
            dz,
            dhidden,
            Published(sums, gate.new_empty((layout.N, team.size, R))),
            meet_at,
            layout.sizes,
            R,
            HIDDEN_ACTIVATION=hidden_activation,
            GATE_ACTIVATION=GATE_ACTIVATIONS[gate_activation],
            ACTIVATION=activation,
            BLOCKS=_blocks(team, R),
            TILE=team.tile,
            num_warps=team.tile.num_warps,
        )
        mlp = empty_mlp_grads(dz, dhidden, w1, w2, mean, hidden, hidden_activation)
        m = mlp.tile(32)
        launch(_mlp_grads_kernel, mlp.programs(m), mlp.operands, layout.N, MLP=m, num_warps=2)
        return dx, dresidual, *mlp.results
