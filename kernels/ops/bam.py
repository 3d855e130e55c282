"""BAM: the passes over x around its branches, whose results make one gate, ``1 + sigmoid`` of their product or sum.

One branch has a result per channel [N, C], the other per pixel [N, HW].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, activate, activation_grad, sigmoid
from ..core.heuristics import grain, reduction, tile, tiles
from ..core.launch import device_guard, launch
from ..core.layout import Layout, MapSizes, canonical, contiguous
from ..core.tiles import (
    dense_offsets,
    load_channels,
    load_pixels,
    program_tile,
    tile_full,
    tile_mask,
    x_offsets,
)
from ..passes.partials import combine


@triton.jit
def _joint(channel, spatial, ADDED: tl.constexpr):
    """Returns the sigmoid [BLOCK_C, BLOCK_P] of the branches' product, or of their sum."""
    joint = channel[:, None] + spatial[None, :] if ADDED else channel[:, None] * spatial[None, :]
    return sigmoid(joint)


@triton.jit
def _apply_joint_kernel(
    v_ptr,
    channel_ptr,
    spatial_ptr,
    dmean_ptr,
    more_ptr,
    out_ptr,
    size,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = act(v * (1 + sigmoid) [+ dmean / HW] [+ more])."""
    acc_ty = channel_ptr.dtype.element_ty
    n, c, p = program_tile(size, TILE)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    v = tl.load(v_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0).to(acc_ty)
    v *= 1 + _joint(load_channels(channel_ptr, n, c, size), load_pixels(spatial_ptr, n, p, size), ADDED)
    if dmean_ptr is not None:
        v += (load_channels(dmean_ptr, n, c, size) / size.HW)[:, None]
    if more_ptr is not None:
        v += tl.load(more_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
    tl.store(out_ptr + offsets, activate(v, ACTIVATION), mask=mask)


@triton.jit
def _joint_sums_kernel(
    grad_ptr,
    x_ptr,
    residual_ptr,
    channel_ptr,
    spatial_ptr,
    dresidual_ptr,
    dchannel_ptr,
    dspatial_ptr,
    size,
    steps,
    ACTIVATION: tl.constexpr,
    ADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Partials of both branches' gradients from one read, d = g' x s (1 - s) with the sigmoid s, g' = grad * act'(z).

    dchannel [N, ., C]: the sum over pixels of d [* spatial]. dspatial [N, ., HW]: over channels of d [* channel].
    A program keeps a block of the inner axis and walks a share of the outer one, as in `gate._gate_grads_kernel`.
    """
    acc_ty = dchannel_ptr.dtype.element_ty
    blocks = tl.cdiv(size.C, TILE.BLOCK_C) if TILE.CHANNELS_LAST else tl.cdiv(size.HW, TILE.BLOCK_P)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64)
    share = tl.program_id(1)
    first_tile = share * steps
    c = (block if TILE.CHANNELS_LAST else first_tile) * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C)
    p = (first_tile if TILE.CHANNELS_LAST else block) * TILE.BLOCK_P + tl.arange(0, TILE.BLOCK_P)
    inner = (n * blocks + block) * (size.HW if TILE.CHANNELS_LAST else size.C)
    outer = (n * tl.num_programs(1) + share) * (size.C if TILE.CHANNELS_LAST else size.HW)

    acc = tile_full(0, TILE, acc_ty)
    for step in range(steps):
        cs = c if TILE.CHANNELS_LAST else c + step * TILE.BLOCK_C
        ps = p + step * TILE.BLOCK_P if TILE.CHANNELS_LAST else p
        mask = tile_mask(cs, ps, size, TILE)
        offsets = dense_offsets(n, cs, ps, size, TILE)
        channel, spatial = load_channels(channel_ptr, n, cs, size), load_pixels(spatial_ptr, n, ps, size)
        s = _joint(channel, spatial, ADDED)
        x = tl.load(x_ptr + x_offsets(n, cs, ps, size, TILE), mask=mask, other=0.0).to(acc_ty)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
        if ACTIVATION != NONE:
            z = x * (1 + s)
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(acc_ty)
            g = activation_grad(g, z, ACTIVATION)
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        d = g * x * (s * (1 - s))
        per_channel = d if ADDED else d * spatial[None, :]
        per_pixel = d if ADDED else d * channel[:, None]
        if TILE.CHANNELS_LAST:
            acc += per_channel
            tl.store(dspatial_ptr + inner + ps, tl.sum(per_pixel, 0), mask=ps < size.HW)
        else:
            acc += per_pixel
            tl.store(dchannel_ptr + inner + cs, tl.sum(per_channel, 1), mask=cs < size.C)
    if TILE.CHANNELS_LAST:
        tl.store(dchannel_ptr + outer + c, tl.sum(acc, 1), mask=c < size.C)
    else:
        tl.store(dspatial_ptr + outer + p, tl.sum(acc, 0), mask=p < size.HW)


def _apply_joint(
    v: torch.Tensor,
    sizes: MapSizes,
    layout: Layout,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    added: bool,
    dmean: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
    activation: int = NONE.value,
) -> torch.Tensor:
    """Returns the map of `_apply_joint_kernel` in this layout. Reads v, which has these sizes and strides, and more."""
    out, t = layout.empty(v), tile(layout, *grain("scale", layout))
    launch(
        _apply_joint_kernel,
        tiles(layout, t),
        v,
        channel.contiguous(),
        spatial.contiguous(),
        contiguous(dmean),
        layout.dense_or_none(more),
        out,
        sizes,
        ACTIVATION=activation,
        ADDED=added,
        TILE=t,
        num_warps=t.num_warps,
    )
    return out


def _joint_sums(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    added: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns dchannel, dspatial, like the branches' results, and dresidual. Reads x, grad and the residual once."""
    N, C, HW = layout.N, layout.C, layout.HW
    t, blocks, splits, steps = reduction(layout, not layout.channels_last, *grain("gate gradients", layout))
    channel, spatial = channel.contiguous(), spatial.contiguous()
    partials_c, partials_p = (splits, blocks) if layout.channels_last else (blocks, splits)
    of_channel, of_pixel = channel.new_empty((N, partials_c, C)), channel.new_empty((N, partials_p, HW))
    dresidual = layout.empty_dresidual(x, activation)
    launch(
        _joint_sums_kernel,
        N * blocks,
        layout.dense(grad),
        x,
        layout.dense_or_none(residual if activation else None),
        channel,
        spatial,
        dresidual,
        of_channel,
        of_pixel,
        layout.sizes,
        steps,
        ACTIVATION=activation,
        ADDED=added,
        TILE=t,
        num_warps=t.num_warps,
        splits=splits,
    )
    dchannel = combine(of_channel, None, torch.empty_like(channel))
    return dchannel, combine(of_pixel, None, torch.empty_like(spatial)), dresidual


def bam_scale(
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    added: bool,
) -> torch.Tensor:
    """Computes y = act(x * (1 + sigmoid(channel * spatial)) + residual), or with the branches' sum.

    x, residual [N, C, H, W], channel [N, C], spatial [N, H, W]. Moves 2 times the bytes of x.
    """
    with device_guard(x):
        x, layout = canonical(x)
        return _apply_joint(x, layout.sizes, layout, channel, spatial, added, more=residual, activation=activation)


def bam_scale_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    added: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes both branches' gradients from g' = grad * act'(x * gate + residual).

    Returns dchannel [N, C], dspatial [N, H, W], dresidual. Moves 2 times the bytes of x; with an activation g' is
    written, too, as dresidual (else empty: it is grad).
    """
    with device_guard(x):
        x, layout = canonical(x)
        return _joint_sums(grad, x, layout, channel, spatial, residual, activation, added)


def bam_input_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    channel: torch.Tensor,
    spatial: torch.Tensor,
    dmean: torch.Tensor | None,
    dbranch: torch.Tensor | None,
    added: bool,
) -> torch.Tensor:
    """Computes dx = grad * gate + dmean / HW + dbranch, in x's layout; dmean [N, C], dbranch like x.

    Moves 3 times the bytes of x, not x itself.
    """
    with device_guard(x):
        x, layout = canonical(x)
        strides = {"stride_n": layout.C * layout.HW, "stride_o": layout.C if layout.channels_last else layout.HW}
        sizes = layout.sizes._replace(**strides)
        return _apply_joint(layout.dense(grad), sizes, layout, channel, spatial, added, dmean, dbranch)
