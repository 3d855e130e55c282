"""Efficient channel attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._gate import gate_grads, input_grad, scale
from ._heuristics import Team, cdiv, next_power_of_2, vector_block
from ._launch import device_guard, launch
from ._layout import Layout, accumulation_dtype, canonical
from ._pool import combine, mean_hw
from ._resident import _eca_resident_bwd_kernel, _eca_resident_fwd_kernel, blocks, exchange, team_of
from ._tiles import sigmoid


@triton.jit
def _eca_gate_kernel(mean_ptr, w_ptr, gate_ptr, C, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """gate [N, C] = sigmoid(cross-correlation of mean [N, C] with w [K], zero padding K // 2)."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * C
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + k, mask=k < K, other=0.0).to(mean_ptr.dtype.element_ty)
    source = c[None, :] + k[:, None] - K // 2
    inside = (k < K)[:, None] & (source >= 0) & (source < C)
    v = tl.load(mean_ptr + row + source, mask=inside, other=0.0)
    tl.store(gate_ptr + row + c, sigmoid(tl.sum(v * w[:, None], 0)), mask=c < C)


@triton.jit
def _eca_gate_bwd_kernel(
    dz_ptr, mean_ptr, w_ptr, dmean_ptr, parts_ptr, C, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dmean [N, C] = transposed convolution of dz [N, C] with w [K]; parts [programs, K]: sums of dz * shifted mean."""
    blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64) * C
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + k, mask=k < K, other=0.0).to(dz_ptr.dtype.element_ty)
    shift = k[:, None] - K // 2
    target, source = c[None, :] - shift, c[None, :] + shift
    in_block = (k < K)[:, None] & (c < C)[None, :]
    dz = tl.load(dz_ptr + row + target, mask=in_block & (target >= 0) & (target < C), other=0.0)
    tl.store(dmean_ptr + row + c, tl.sum(dz * w[:, None], 0), mask=c < C)
    v = tl.load(mean_ptr + row + source, mask=in_block & (source >= 0) & (source < C), other=0.0)
    v *= tl.load(dz_ptr + row + c, mask=c < C, other=0.0)[None, :]
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(v, 1), mask=k < K)


def eca_fwd(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = act(x * gate + residual), gate = sigmoid(conv1d(mean)) along C with zero padding, mean over H and W.

    x, residual [N, C, H, W]; weight k elements, k odd. Returns y, mean [N, C], gate [N, C].
    Moves 3 times the bytes of x: read to pool, read to scale, write y; one more for a residual. With
    `_heuristics.RESIDENT` twice, where the image stays on the chip.
    """
    with device_guard(x):
        x, layout = canonical(x)
        if team := team_of(x, layout):
            return _resident_fwd(x, layout, team, weight, residual, activation)
        mean = mean_hw(x, layout)
        gate = torch.empty_like(mean)
        K, block = weight.numel(), vector_block(layout.C)
        launch(
            _eca_gate_kernel, layout.N * cdiv(layout.C, block),
            mean, weight.reshape(-1).contiguous(), gate, layout.C,
            K=K, BLOCK_K=next_power_of_2(K), BLOCK_C=block,
        )  # fmt: skip
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
        if team := team_of(x, layout):
            return _resident_bwd(grad, x, layout, team, weight, residual, mean, gate, activation)
        g, dresidual, parts, _ = gate_grads(grad, x, layout, gate, None, residual, activation)
        dz = combine(parts, gate, torch.empty_like(gate))
        dmean, dweight = _eca_gate_bwd(dz, weight, mean)
        return input_grad(x, layout, grad=g, channel_gate=gate, dpooled=dmean), dresidual, dweight


def _eca_gate_bwd(dz: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (N, C), K = mean.shape, weight.numel()
    dmean = torch.empty_like(mean)
    if not N:
        return dmean, mean.new_zeros(weight.shape)
    block = vector_block(C)
    programs = N * cdiv(C, block)
    parts = mean.new_empty((1, programs, K))
    launch(
        _eca_gate_bwd_kernel, programs,
        dz, mean, weight.reshape(-1).contiguous(), dmean, parts, C,
        K=K, BLOCK_K=next_power_of_2(K), BLOCK_C=block,
    )  # fmt: skip
    return dmean, combine(parts, None, mean.new_empty(weight.shape))


def _resident_fwd(
    x: torch.Tensor, layout: Layout, team: Team, weight: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`eca_fwd` in one launch, which reads x once."""
    y = layout.empty(x)
    mean = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
    gate = torch.empty_like(mean)
    launch(
        _eca_resident_fwd_kernel, layout.N * team.size,
        x, weight.reshape(-1).contiguous(), None if residual is None else layout.dense(residual), y, mean, gate,
        *exchange(layout, team, mean), layout.C, layout.HW, layout.stride_n, layout.stride_o,
        K=weight.numel(), ACTIVATION=activation, **blocks(team),
    )  # fmt: skip
    return y, mean, gate


def _resident_bwd(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, team: Team, weight: torch.Tensor,
    residual: torch.Tensor | None, mean: torch.Tensor, gate: torch.Tensor, activation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`eca_bwd`, whose first launch reads grad and x once; the others make the weight's gradient from small tensors."""
    dx, dresidual = layout.empty(x), layout.empty(x) if activation else x.new_empty(0)
    dz = torch.empty_like(gate)
    launch(
        _eca_resident_bwd_kernel, layout.N * team.size,
        layout.dense(grad), x, weight.reshape(-1).contiguous(),
        layout.dense(residual) if activation and residual is not None else None,
        gate, dx, dresidual, dz, *exchange(layout, team, gate), layout.C, layout.HW, layout.stride_n, layout.stride_o,
        K=weight.numel(), ACTIVATION=activation, **blocks(team),
    )  # fmt: skip
    return dx, dresidual, _eca_gate_bwd(dz, weight, mean)[1]
