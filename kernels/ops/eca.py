"""Efficient channel attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import Team, cdiv, next_power_of_2, registers_for, vector_block
from ..core.launch import device_guard, launch
from ..core.layout import Layout, accumulation_dtype, canonical
from ..core.tiles import SIGMOID, gate_grad, sigmoid
from ..experimental.resident import _eca_resident_bwd_kernel, _eca_resident_fwd_kernel, blocks, exchange, team_of
from ..passes.gate import gate_grads, scale
from ..passes.input_grad import input_grad
from ..passes.pool import Parts, combine, combine_parts, pool_hw
from ..passes.weight_grads import RowSum, row_sum

MOST_SLOTS = 64  # parts of a sum that are added up again at every tap


@triton.jit
def _slots_sum(slots_ptr, n, c, inside, slots, C):
    """Sum of what an image's slots [N, slots, C] hold of channels c, in order."""
    total = tl.zeros(c.shape, slots_ptr.dtype.element_ty)
    for slot in tl.range(0, slots, loop_unroll_factor=8):
        total += tl.load(slots_ptr + (n * slots + slot) * C + c, mask=inside, other=0.0)
    return total


@triton.jit
def _eca_gate_kernel(
    slots_ptr, mean_ptr, w_ptr, gate_ptr, slots, divisor, C,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gate [N, C] = sigmoid(cross-correlation of the mean [N, C] with w [K], zero padding K // 2).

    The mean is the sum of the slots, divided; where there is more than one, it is stored, too.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + k, mask=k < K, other=0.0).to(gate_ptr.dtype.element_ty)
    source = c[None, :] + k[:, None] - K // 2
    inside = (k < K)[:, None] & (source >= 0) & (source < C)
    v = _slots_sum(slots_ptr, n, source, inside, slots, C) / divisor
    if mean_ptr is not None:
        tl.store(mean_ptr + n * C + c, _slots_sum(slots_ptr, n, c, c < C, slots, C) / divisor, mask=c < C)
    tl.store(gate_ptr + n * C + c, sigmoid(tl.sum(v * w[:, None], 0)), mask=c < C)


@triton.jit
def _dz(slots_ptr, gate_ptr, n, c, inside, slots, C):
    """The gradient before the sigmoid at channels c: the sum of the slots, with a gate times its derivative."""
    dz = _slots_sum(slots_ptr, n, c, inside, slots, C)
    if gate_ptr is not None:
        dz *= gate_grad(tl.load(gate_ptr + n * C + c, mask=inside, other=0.0), SIGMOID)
    return dz


@triton.jit
def _eca_gate_bwd_kernel(
    slots_ptr, gate_ptr, mean_ptr, w_ptr, dmean_ptr, parts_ptr, slots, C,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dmean [N, C] = transposed convolution of dz [N, C] with w [K]; parts [programs, K]: sums of dz * shifted mean."""
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + k, mask=k < K, other=0.0).to(mean_ptr.dtype.element_ty)
    shift = k[:, None] - K // 2
    target, source = c[None, :] - shift, c[None, :] + shift
    in_block = (k < K)[:, None] & (c < C)[None, :]
    dz = _dz(slots_ptr, gate_ptr, n, target, in_block & (target >= 0) & (target < C), slots, C)
    tl.store(dmean_ptr + n * C + c, tl.sum(dz * w[:, None], 0), mask=c < C)
    v = tl.load(mean_ptr + n * C + source, mask=in_block & (source >= 0) & (source < C), other=0.0)
    v *= _dz(slots_ptr, gate_ptr, n, c, c < C, slots, C)[None, :]
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(v, 1), mask=k < K)


def eca_fwd(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, activation: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = act(x * gate + residual), gate = sigmoid(conv1d(mean)) along C with zero padding, mean over H and W.

    x, residual [N, C, H, W]; weight k elements, k odd. Returns y, mean [N, C], gate [N, C].
    Moves 3 times the bytes of x: read to pool, read to scale, write y; one more for a residual. With
    `heuristics.RESIDENT` twice, where the image stays on the chip.
    """
    with device_guard(x):
        x, layout = canonical(x)
        if team := team_of(x, layout):
            return _resident_fwd(x, layout, team, weight, residual, activation)
        parts = pool_hw(x, layout, with_max=False)
        if parts.slots > MOST_SLOTS:
            parts = Parts(combine_parts(parts)[0], None, 1, 1)
        mean = parts.values if parts.complete else parts.empty()[0]
        gate = torch.empty_like(mean)
        K, block = weight.numel(), vector_block(layout.C)
        launch(
            _eca_gate_kernel, layout.N * cdiv(layout.C, block),
            parts.values, None if parts.complete else mean, weight.reshape(-1).contiguous(), gate,
            parts.slots, parts.divisor, layout.C, K=K, BLOCK_K=next_power_of_2(K), BLOCK_C=block,
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
        dmean, dweight = _eca_gate_bwd(parts, gate, weight, mean)
        dx = input_grad(x, layout, grad=g, channel_gate=gate, dpooled=dmean, sums=(dweight,))
        return dx, dresidual, dweight.out


def _eca_gate_bwd(
    parts: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, RowSum]:
    """From parts [N, S, C] of the gate's gradient, without a gate of that before the sigmoid: (dmean, and dweight)."""
    (N, slots, C), K = parts.shape, weight.numel()
    if slots > MOST_SLOTS:
        parts, gate, slots = combine(parts, gate, torch.empty_like(mean))[:, None], None, 1
    block = vector_block(C)
    programs = N * cdiv(C, block)
    dmean, of_weight = torch.empty_like(mean), mean.new_empty((programs, K))
    launch(
        _eca_gate_bwd_kernel, programs,
        parts, gate, mean, weight.reshape(-1).contiguous(), dmean, of_weight, slots, C,
        K=K, BLOCK_K=next_power_of_2(K), BLOCK_C=block,
    )  # fmt: skip
    return dmean, row_sum(of_weight, weight)


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
        **registers_for(x, team.tile.num_warps),
    )  # fmt: skip
    dweight = _eca_gate_bwd(dz[:, None], None, weight, mean)[1]
    dweight.run()
    return dx, dresidual, dweight.out
