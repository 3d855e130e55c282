"""The spatial gate `sigmoid(conv(maps, w) + b)`, maps [N, 2, H, W], w [1, 2, k, k], b [1], forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import sigmoid
from ..core.heuristics import cdiv, next_power_of_2, split, summed_steps, vector_block
from ..core.launch import launch
from .weight_grads import RowSum, empty_row_sum


@triton.jit
def _conv_gate_kernel(maps_ptr, w_ptr, b_ptr, gate_ptr, H, W, K: tl.constexpr, BLOCK_P: tl.constexpr):
    """gate [N, H, W] = sigmoid(cross-correlation of maps [N, 2, H, W] with w [2, K, K], zero padding K // 2, + b)."""
    acc_ty = maps_ptr.dtype.element_ty
    HW = H * W
    blocks = tl.cdiv(HW, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    h, w = p // W, p % W
    acc = tl.zeros([BLOCK_P], acc_ty)
    for i in range(2):
        for kh in range(K):
            y = h + kh - K // 2
            row = (n * 2 + i) * HW + y * W
            for kw in tl.static_range(K):
                x = w + kw - K // 2
                inside = (p < HW) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
                v = tl.load(maps_ptr + row + x, mask=inside, other=0.0)
                acc += v * tl.load(w_ptr + (i * K + kh) * K + kw).to(acc_ty)
    if b_ptr is not None:
        acc += tl.load(b_ptr).to(acc_ty)
    tl.store(gate_ptr + n * HW + p, sigmoid(acc), mask=p < HW)


@triton.jit
def _maps_grad(program, dq_ptr, w_ptr, dmaps_ptr, H, W, K: tl.constexpr, BLOCK_P: tl.constexpr):
    """dmaps [N, 2, H, W] = transposed convolution of dq [N, H, W] with w [2, K, K]."""
    acc_ty = dq_ptr.dtype.element_ty
    HW = H * W
    blocks = tl.cdiv(HW, BLOCK_P)
    n = (program // blocks).to(tl.int64)
    p = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    h, w = p // W, p % W
    dmean = tl.zeros([BLOCK_P], acc_ty)
    dmax = tl.zeros([BLOCK_P], acc_ty)
    for kh in range(K):
        y = h - kh + K // 2
        row = n * HW + y * W
        for kw in tl.static_range(K):
            x = w - kw + K // 2
            inside = (p < HW) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            v = tl.load(dq_ptr + row + x, mask=inside, other=0.0)
            dmean += v * tl.load(w_ptr + kh * K + kw).to(acc_ty)
            dmax += v * tl.load(w_ptr + (K + kh) * K + kw).to(acc_ty)
    tl.store(dmaps_ptr + n * 2 * HW + p, dmean, mask=p < HW)
    tl.store(dmaps_ptr + (n * 2 + 1) * HW + p, dmax, mask=p < HW)


@triton.jit
def _weight_grad(
    program,
    dq_ptr,
    maps_ptr,
    partials_ptr,
    bias_partials_ptr,
    H,
    W,
    splits,
    steps,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partials [N, splits, 2, K, K] = sum over a share of the pixels of dq [N, H, W] * shifted maps [N, 2, H, W].

    A program has one row of taps. bias_partials [N, splits] are the sums of dq alone.
    """
    acc_ty = dq_ptr.dtype.element_ty
    HW = H * W
    row = program % (2 * K)
    share = program // (2 * K) % splits
    n = (program // (2 * K) // splits).to(tl.int64)
    dh = row % K - K // 2
    t = tl.arange(0, BLOCK_T)
    maps_ptr += (n * 2 + row // K) * HW + dh * W
    acc = tl.zeros([BLOCK_T, BLOCK_P], acc_ty)
    total = tl.zeros([BLOCK_P], acc_ty)
    for step in range(steps):
        p = (share * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        y = p // W + dh
        x = (p % W)[None, :] + t[:, None] - K // 2
        inside = ((p < HW) & (y >= 0) & (y < H))[None, :] & (t < K)[:, None] & (x >= 0) & (x < W)
        v = tl.load(maps_ptr + p[None, :] + t[:, None] - K // 2, mask=inside, other=0.0)
        dq = tl.load(dq_ptr + n * HW + p, mask=p < HW, other=0.0)
        acc += v * dq[None, :]
        total += dq
    out = n * splits + share
    tl.store(partials_ptr + (out * 2 * K + row) * K + t, tl.sum(acc, 1), mask=t < K)
    if bias_partials_ptr is not None:
        tl.store(bias_partials_ptr + out, tl.sum(total, 0), mask=row == 0)


@triton.jit
def _conv_grads_kernel(
    dq_ptr,
    w_ptr,
    maps_ptr,
    dmaps_ptr,
    partials_ptr,
    bias_partials_ptr,
    H,
    W,
    weight_programs,
    splits,
    steps,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Both gradients of the convolution. The weight's, which takes longer, comes first."""
    program = tl.program_id(0)
    if program < weight_programs:
        _weight_grad(
            program, dq_ptr, maps_ptr, partials_ptr, bias_partials_ptr, H, W, splits, steps, K, BLOCK_T, BLOCK_S
        )
    else:
        _maps_grad(program - weight_programs, dq_ptr, w_ptr, dmaps_ptr, H, W, K, BLOCK_P)


def conv_gate(maps: torch.Tensor, wconv: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor) -> torch.Tensor:
    """Writes gate [N, (1,) H, W] from maps [N, 2, H, W], and returns it."""
    N, _, H, W = maps.shape
    block = vector_block(H * W)
    launch(
        _conv_gate_kernel,
        N * cdiv(H * W, block),
        maps,
        wconv.contiguous(),
        bias,
        gate,
        H,
        W,
        K=wconv.shape[-1],
        BLOCK_P=block,
    )
    return gate


def conv_gate_bwd(
    dq: torch.Tensor, wconv: torch.Tensor, bias: torch.Tensor | None, maps: torch.Tensor
) -> tuple[torch.Tensor, tuple[RowSum, RowSum]]:
    """Returns dmaps, like maps, and the sums that make dwconv and dbias.

    dq [N, HW] is the gradient before the sigmoid. dwconv is like wconv, dbias is [1], or [0] without a bias; both have
    wconv's dtype.
    """
    N, _, H, W = maps.shape
    K = wconv.shape[-1]
    dmaps, rows = torch.empty_like(maps), 2 * K
    block, block_s = vector_block(H * W), vector_block(H * W, 512)
    tiles = cdiv(H * W, block_s)
    steps = summed_steps(split(N * rows, tiles)[1], tiles)
    splits = cdiv(tiles, steps)
    partials = maps.new_empty((N * splits, rows * K))
    bias_partials = maps.new_empty((0 if bias is None else N * splits, 1))
    weight_programs = N * rows * splits
    launch(
        _conv_grads_kernel,
        weight_programs + N * cdiv(H * W, block),
        dq,
        wconv.contiguous(),
        maps,
        dmaps,
        partials,
        None if bias is None else bias_partials,
        H,
        W,
        weight_programs,
        splits,
        steps,
        K=K,
        BLOCK_T=next_power_of_2(K),
        BLOCK_S=block_s,
        BLOCK_P=block,
    )
    dbias = wconv.new_empty(0 if bias is None else 1)
    return dmaps, (empty_row_sum(partials, wconv), empty_row_sum(bias_partials, dbias))
