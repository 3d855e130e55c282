"""Self-gates of whole planes: one program reads them once, and does all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.activations import NONE, activate, activation_grad
from ...core.heuristics import Tile, tiles
from ...core.launch import launch
from ...core.layout import Layout, accumulation_dtype
from ...core.tiles import dense_offsets, tile_mask
from .gate import Gate
from .tiles import (
    SIMAM,
    channel_tile,
    deviation_and_gate,
    dx_tile,
    load_x,
    logit_parameters,
    scale_of,
    store_dx,
    summands,
    x_channel,
)


@triton.jit
def _plane_fwd_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    weights,
    size,
    K,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """Statistics and gate of whole planes: mean and scale [N, C], y. Reads x once."""
    acc_ty = mean_ptr.dtype.element_ty
    C = size.C
    n, c0, c, p = channel_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    x = load_x(x_ptr, n, c0, c, p, size, KIND, TILE).to(acc_ty)
    cx = x_channel(c, C, KIND)
    a, b, k, spatial = logit_parameters(weights, cx, C, K, acc_ty, KIND)  # before x is waited for
    mean = tl.sum(x, 1) / size.HW
    d = tl.where(mask, x - mean[:, None], 0.0)
    scale = scale_of(tl.sum(d * d, 1), size.HW, EPS, KIND)
    tl.store(mean_ptr + n * C + cx, mean, mask=c < C)
    tl.store(scale_ptr + n * C + cx, scale, mask=c < C)
    _, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    offsets = dense_offsets(n, c, p, size, TILE)
    v = x * s
    if residual_ptr is not None:
        v += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(y_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _plane_bwd_kernel(
    grad_ptr,
    x_ptr,
    residual_ptr,
    mean_ptr,
    scale_ptr,
    weights,
    dx_ptr,
    dresidual_ptr,
    sums_ptr,
    size,
    K,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx of whole planes and, for kinds with weights, the sums of r and r d [N, 2, C]. Reads x and grad once."""
    acc_ty = mean_ptr.dtype.element_ty
    C = size.C
    n, c0, c, p = channel_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    x = load_x(x_ptr, n, c0, c, p, size, KIND, TILE).to(acc_ty)
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    cx = x_channel(c, C, KIND)
    mean = tl.load(mean_ptr + n * C + cx, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + n * C + cx, mask=c < C, other=0.0)
    a, b, k, spatial = logit_parameters(weights, cx, C, K, acc_ty, KIND)
    d, s = deviation_and_gate(x, mean, scale, a, b, k, spatial, KIND)
    if ACTIVATION != NONE:
        z = x * s
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        g = activation_grad(g, z, ACTIVATION)
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    base = g * s
    r = base * x * (1 - s)
    first, second = summands(r, d, KIND)
    first, second = tl.split(tl.sum(tl.join(first, second), 1))  # both at once: their warps meet once
    if KIND != SIMAM:
        tl.store(sums_ptr + n * 2 * C + c, first, mask=c < C)
        tl.store(sums_ptr + (n * 2 + 1) * C + c, second, mask=c < C)
    dx = dx_tile(base, r, d, mean, scale, a, k, spatial, first, second, size.HW, KIND)
    store_dx(dx_ptr, dx, n, c0, c, p, size, KIND, TILE)


def plane_gate(
    x: torch.Tensor, layout: Layout, gate: Gate, t: Tile, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y, and mean and scale [N, C]. Reads x once."""
    mean = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
    y, scale = layout.empty(x), torch.empty_like(mean)
    launch(
        _plane_fwd_kernel,
        tiles(layout, t),
        x,
        layout.dense_or_none(residual),
        y,
        mean,
        scale,
        gate.weights,
        layout.sizes,
        gate.width,
        EPS=gate.eps,
        KIND=gate.kind.value,
        ACTIVATION=activation,
        TILE=t,
        num_warps=t.num_warps,
    )
    return y, mean, scale


def plane_gate_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    gate: Gate,
    t: Tile,
    mean: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (dx, dresidual, sums of r and r d [N, 2, C] in the order of y). Reads x and grad once."""
    dx, sums = layout.empty(x), mean.new_empty((layout.N, 2, layout.C))
    dresidual = layout.empty_dresidual(x, activation)
    launch(
        _plane_bwd_kernel,
        tiles(layout, t),
        layout.dense(grad),
        x,
        layout.dense_or_none(residual if activation else None),
        mean,
        scale,
        gate.weights,
        dx,
        dresidual,
        sums,
        layout.sizes,
        gate.width,
        KIND=gate.kind.value,
        ACTIVATION=activation,
        TILE=t,
        num_warps=t.num_warps,
    )
    return dx, dresidual, sums
