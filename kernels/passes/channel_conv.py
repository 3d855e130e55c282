"""ECA's gate `sigmoid(conv1d(mean, w))` along the channels, mean [N, C], w [k], forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import SIGMOID, gate_grad, sigmoid
from ..core.heuristics import cdiv, next_power_of_2, vector_block
from ..core.launch import launch
from .partials import Partials, combine, combine_pooled
from .weight_grads import RowSum, empty_row_sum

MOST_PARTIALS = 64  # of a sum that every tap adds up again


@triton.jit
def _total(partials_ptr, n, c, inside, partials, C):
    """Returns the sum of an image's partials [N, partials, C] at channels c, in order."""
    total = tl.zeros(c.shape, partials_ptr.dtype.element_ty)
    for i in tl.range(0, partials, loop_unroll_factor=8):
        total += tl.load(partials_ptr + (n * partials + i) * C + c, mask=inside, other=0.0)
    return total


@triton.jit
def _eca_gate_kernel(
    partials_ptr,
    mean_ptr,
    w_ptr,
    gate_ptr,
    partials,
    divisor,
    C,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """gate [N, C] = sigmoid(cross-correlation of the mean [N, C] with w [K], zero padding K // 2).

    The mean is the sum of the partials / divisor, and is stored unless mean_ptr is None.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + k, mask=k < K, other=0.0).to(gate_ptr.dtype.element_ty)
    source = c[None, :] + k[:, None] - K // 2
    inside = (k < K)[:, None] & (source >= 0) & (source < C)
    v = _total(partials_ptr, n, source, inside, partials, C) / divisor
    if mean_ptr is not None:
        tl.store(mean_ptr + n * C + c, _total(partials_ptr, n, c, c < C, partials, C) / divisor, mask=c < C)
    tl.store(gate_ptr + n * C + c, sigmoid(tl.sum(v * w[:, None], 0)), mask=c < C)


@triton.jit
def _dz(partials_ptr, gate_ptr, n, c, inside, partials, C):
    """Returns the gradient before the sigmoid at channels c; the partials' sum is that itself if gate_ptr is None."""
    dz = _total(partials_ptr, n, c, inside, partials, C)
    if gate_ptr is not None:
        dz *= gate_grad(tl.load(gate_ptr + n * C + c, mask=inside, other=0.0), SIGMOID)
    return dz


@triton.jit
def _eca_gate_bwd_kernel(
    partials_ptr,
    gate_ptr,
    mean_ptr,
    w_ptr,
    dmean_ptr,
    dw_partials_ptr,
    partials,
    C,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dmean [N, C] = transposed convolution of dz [N, C] with w.

    dw_partials [programs, K] are sums of dz * shifted mean.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + k, mask=k < K, other=0.0).to(mean_ptr.dtype.element_ty)
    shift = k[:, None] - K // 2
    target, source = c[None, :] - shift, c[None, :] + shift
    in_block = (k < K)[:, None] & (c < C)[None, :]
    dz = _dz(partials_ptr, gate_ptr, n, target, in_block & (target >= 0) & (target < C), partials, C)
    tl.store(dmean_ptr + n * C + c, tl.sum(dz * w[:, None], 0), mask=c < C)
    v = tl.load(mean_ptr + n * C + source, mask=in_block & (source >= 0) & (source < C), other=0.0)
    v *= _dz(partials_ptr, gate_ptr, n, c, c < C, partials, C)[None, :]
    tl.store(dw_partials_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(v, 1), mask=k < K)


def eca_gate(partials: Partials, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and gate [N, C] from partials of the mean; the weight has k elements."""
    if partials.splits > MOST_PARTIALS:
        partials = Partials(combine_pooled(partials)[0], None, 1, 1)
    mean = partials.values if partials.complete else partials.empty_results()[0]
    gate = torch.empty_like(mean)
    C, K = mean.shape[1], weight.numel()
    block = vector_block(C)
    launch(
        _eca_gate_kernel,
        mean.shape[0] * cdiv(C, block),
        partials.values,
        None if partials.complete else mean,
        weight.reshape(-1).contiguous(),
        gate,
        partials.splits,
        partials.divisor,
        C,
        K=K,
        BLOCK_K=next_power_of_2(K),
        BLOCK_C=block,
    )
    return mean, gate


def eca_gate_bwd(
    partials: torch.Tensor, gate: torch.Tensor | None, weight: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, RowSum]:
    """Returns dmean [N, C], and the sum that makes dweight, from partials [N, S, C] of the gate's gradient.

    Without a gate the partials are of the gradient before the sigmoid.
    """
    (N, S, C), K = partials.shape, weight.numel()
    if S > MOST_PARTIALS:
        partials, gate, S = combine(partials, gate, torch.empty_like(mean))[:, None], None, 1
    block = vector_block(C)
    programs = N * cdiv(C, block)
    dmean, dw_partials = torch.empty_like(mean), mean.new_empty((programs, K))
    launch(
        _eca_gate_bwd_kernel,
        programs,
        partials,
        gate,
        mean,
        weight.reshape(-1).contiguous(),
        dmean,
        dw_partials,
        S,
        C,
        K=K,
        BLOCK_K=next_power_of_2(K),
        BLOCK_C=block,
    )
    return dmean, empty_row_sum(dw_partials, weight)
