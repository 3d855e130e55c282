"""The input's gradient of LocalAttention: through both gates' product, the perceptron and the mean."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import cdiv
from ..core.launch import launch
from ..core.layout import Layout
from ..core.product import add_product, product
from ..core.tiles import dense_offsets, load_channels, load_pixels, tile_mask
from .pixel_mlp import masked_by_signs, product_tile, unit_block


@triton.jit
def _pixel_mlp_dx_kernel(
    grad_ptr,
    channel_gate_ptr,
    spatial_gate_ptr,
    dmean_ptr,
    weight_ptr,
    dlogits_ptr,
    signs_ptr,
    dx_ptr,
    size,
    S,
    PRODUCT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """dx = grad * channel_gate * spatial_gate + weight^T (mask dlogits) + dmean / HW; weight [S, C] is p2 p1."""
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    C, HW = size.C, size.HW
    acc_ty = dlogits_ptr.dtype.element_ty
    blocks_p, blocks_c = tl.cdiv(HW, BLOCK_P), tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n = (pid // blocks_c // blocks_p).to(tl.int64)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p = pid // blocks_c % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = tile_mask(c, p, size, TILE)
    offsets = dense_offsets(n, c, p, size, TILE)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)  # in flight while the product waits for its operands
    dlogits = load_pixels(dlogits_ptr, n, p, size)
    through = tl.zeros([BLOCK_P, BLOCK_C], acc_ty)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        w = tl.load(weight_ptr + s[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
        through = add_product(masked_by_signs(dlogits, signs_ptr, n, s, p, S, HW), w, through, PRODUCT)
    g = grad.to(acc_ty)
    g *= load_channels(channel_gate_ptr, n, c, size)[:, None]
    g *= load_pixels(spatial_gate_ptr, n, p, size)[None, :]
    g += (load_channels(dmean_ptr, n, c, size) / HW)[:, None]
    tl.store(dx_ptr + offsets, g + tl.trans(through), mask=mask)


def pixel_mlp_dx(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor,
    dmean: torch.Tensor,
    p1: torch.Tensor,
    weight: torch.Tensor,
    dlogits: torch.Tensor,
    signs: torch.Tensor,
) -> torch.Tensor:
    """Returns dx, like x. Reads grad, writes dx; weight [S, C] is p2 p1."""
    C, S = layout.C, p1.shape[0]
    dx = layout.empty(x)
    # Few warps: each pays for addresses and for the product's operands. A single step has nothing to fetch ahead.
    t, block_s = product_tile(layout, x.element_size(), 64, 128 // x.element_size(), 2048), unit_block(S, 32)
    launch(
        _pixel_mlp_dx_kernel,
        layout.N * cdiv(C, t.BLOCK_C) * cdiv(layout.HW, t.BLOCK_P),
        grad,
        channel_gate,
        spatial_gate,
        dmean,
        weight,
        dlogits,
        signs,
        dx,
        layout.sizes,
        S,
        PRODUCT=product(x, p1),
        BLOCK_S=block_s,
        TILE=t,
        num_warps=t.num_warps,
        num_stages=1 if block_s >= S else 2,
    )
    return dx
