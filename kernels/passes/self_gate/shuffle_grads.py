"""Gradients of shuffle attention's weights, from sums over the pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.heuristics import TILE, cdiv, next_power_of_2, vector_block
from ...core.launch import launch
from .tiles import ShuffleWeights, y_channel


@triton.jit
def _shuffle_weight_grads_kernel(
    sums_ptr,
    mean_ptr,
    rstd_ptr,
    weights,
    dweights,
    C,
    K,
    rows,
    groups,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weights' gradients [K] over `rows` = N groups, from the sums of r and r d [N, 2, C] in the order of y."""
    acc_ty = mean_ptr.dtype.element_ty
    j = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    dcweight = tl.zeros([BLOCK_S, BLOCK_K], acc_ty)
    dcbias = tl.zeros([BLOCK_S, BLOCK_K], acc_ty)
    total = tl.zeros([BLOCK_S, BLOCK_K], acc_ty)
    normed = tl.zeros([BLOCK_S, BLOCK_K], acc_ty)
    for start in range(0, rows, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        mask = (i < rows)[:, None] & (j < K)[None, :]
        n = (i // groups).to(tl.int64)[:, None]
        c = (i % groups * 2 * K)[:, None] + j[None, :]
        pooled = sums_ptr + n * 2 * C + y_channel(c, C)
        spatial = sums_ptr + n * 2 * C + y_channel(c + K, C)
        r = tl.load(pooled, mask=mask, other=0.0)
        dcbias += r
        dcweight += r * tl.load(mean_ptr + n * C + c, mask=mask, other=0.0)
        total += tl.load(spatial, mask=mask, other=0.0)
        rd = tl.load(spatial + C, mask=mask, other=0.0)
        normed += rd * tl.load(rstd_ptr + n * C + c + K, mask=mask, other=0.0)
    inside = j < K
    sweight = tl.load(weights.sweight + j, mask=inside, other=0.0).to(acc_ty)
    gn_weight = tl.load(weights.gn_weight + j, mask=inside, other=0.0).to(acc_ty)
    gn_bias = tl.load(weights.gn_bias + j, mask=inside, other=0.0).to(acc_ty)
    dsbias, scaled = tl.sum(total, 0), tl.sum(normed, 0)
    tl.store(dweights.cweight + j, tl.sum(dcweight, 0), mask=inside)
    tl.store(dweights.cbias + j, tl.sum(dcbias, 0), mask=inside)
    tl.store(dweights.sweight + j, gn_weight * scaled + gn_bias * dsbias, mask=inside)
    tl.store(dweights.sbias + j, dsbias, mask=inside)
    tl.store(dweights.gn_weight + j, sweight * scaled, mask=inside)
    tl.store(dweights.gn_bias + j, sweight * dsbias, mask=inside)


def shuffle_weight_grads(
    sums: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, weights: ShuffleWeights
) -> ShuffleWeights:
    """Returns the gradients of the weights [K], each in its weight's dtype; zeros for an empty batch."""
    (N, C), K = mean.shape, weights.cweight.numel()
    if not N:
        return ShuffleWeights(*(w.new_zeros(w.shape) for w in weights))
    dweights = ShuffleWeights(*(w.new_empty(w.shape) for w in weights))
    groups, block = C // (2 * K), vector_block(K, 64)
    launch(
        _shuffle_weight_grads_kernel,
        cdiv(K, block),
        sums,
        mean,
        rstd,
        weights,
        dweights,
        C,
        K,
        N * groups,
        groups,
        BLOCK_S=min(next_power_of_2(N * groups), TILE // block),
        BLOCK_K=block,
    )
    return dweights
