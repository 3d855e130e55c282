"""Efficient channel attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._gate import gate_grads, input_grad, scale
from ._heuristics import vector_block
from ._layout import canonical, device_guard
from ._pool import combine, pool_hw
from ._tiles import sigmoid


@triton.jit
def _eca_gate_kernel(mean_ptr, w_ptr, gate_ptr, C, K: tl.constexpr, BLOCK_C: tl.constexpr):
    """gate [N, C] = sigmoid(cross-correlation of mean [N, C] with w [K], zero padding K // 2)."""
    acc_ty = mean_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * C
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C], acc_ty)
    for k in tl.static_range(K):
        source = c + k - K // 2
        v = tl.load(mean_ptr + row + source, mask=(source >= 0) & (source < C), other=0.0)
        acc += v * tl.load(w_ptr + k).to(acc_ty)
    tl.store(gate_ptr + row + c, sigmoid(acc), mask=c < C)


@triton.jit
def _eca_gate_bwd_kernel(
    dz_ptr, mean_ptr, w_ptr, dmean_ptr, parts_ptr, C, K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dmean [N, C] = transposed convolution of dz [N, C] with w [K]; parts [programs, K] of the sum of dz * shifted mean."""
    acc_ty = dz_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * C
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    own_dz = tl.load(dz_ptr + row + c, mask=c < C, other=0.0)
    dmean = tl.zeros([BLOCK_C], acc_ty)
    for k in tl.static_range(K):
        source = c + k - K // 2
        v = tl.load(mean_ptr + row + source, mask=(c < C) & (source >= 0) & (source < C), other=0.0)
        tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(own_dz * v, 0))
        target = c - k + K // 2
        dz = tl.load(dz_ptr + row + target, mask=(target >= 0) & (target < C), other=0.0)
        dmean += dz * tl.load(w_ptr + k).to(acc_ty)
    tl.store(dmean_ptr + row + c, dmean, mask=c < C)


def eca_fwd(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = act(x * gate + residual), gate = sigmoid(conv1d(mean)) along C with zero padding, mean over H and W.

    x, residual [N, C, H, W]; weight k elements, k odd. Returns y, mean [N, C], gate [N, C].
    Moves 3 times the bytes of x: read to pool, read to scale, write y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        mean, _ = pool_hw(x, layout)
        gate = torch.empty_like(mean)
        block = vector_block(layout.C)
        if layout.N:
            _eca_gate_kernel[(layout.N * triton.cdiv(layout.C, block),)](
                mean, weight.reshape(-1).contiguous(), gate, layout.C, K=weight.numel(), BLOCK_C=block
            )
        return scale(x, layout, gate, None, residual, activation), mean, gate


def eca_bwd(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, mean: torch.Tensor,
    gate: torch.Tensor, activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dresidual, dweight); dx = g' * gate + dmean / HW, g' = grad * act'(x * gate + residual).

    Moves 4 times the bytes of x: read grad and x, read grad, write dx. With an activation, g' is written once more
    and returned as dresidual (else empty: it is grad), and a residual is read once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        g, dresidual, parts, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        dz = combine(parts, gate, torch.empty_like(gate))
        dmean, dweight = _eca_gate_bwd(dz, weight, mean)
        return input_grad(x, layout, grad=g, channel_gate=gate, dpooled=dmean), dresidual, dweight


def _eca_gate_bwd(
    dz: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    (N, C), K = mean.shape, weight.numel()
    dmean = torch.empty_like(mean)
    if not N:
        return dmean, mean.new_zeros(weight.shape)
    block = vector_block(C)
    programs = N * triton.cdiv(C, block)
    parts = mean.new_empty((1, programs, K))
    _eca_gate_bwd_kernel[(programs,)](
        dz, mean, weight.reshape(-1).contiguous(), dmean, parts, C, K=K, BLOCK_C=block
    )
    return dmean, combine(parts, None, mean.new_empty(weight.shape))
