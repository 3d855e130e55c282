"""Shuffle attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.heuristics import TILE, cdiv, next_power_of_2, vector_block
from ..core.launch import device_guard, launch
from ..core.layout import canonical
from ..passes.self_gate.passes import Gate, self_gate, self_gate_bwd
from ..passes.self_gate.tiles import SHUFFLE, y_channel


@triton.jit
def _weight_grads_kernel(
    sums_ptr, mean_ptr, rstd_ptr, sweight_ptr, gn_weight_ptr, gn_bias_ptr, d0, d1, d2, d3, d4, d5,
    C, K, rows, groups, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d0 to d5, the weights' gradients [K], over `rows` = N groups, from the sums of r and r d [N, 2, C], y's order."""
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
    sweight = tl.load(sweight_ptr + j, mask=inside, other=0.0).to(acc_ty)
    gn_weight = tl.load(gn_weight_ptr + j, mask=inside, other=0.0).to(acc_ty)
    gn_bias = tl.load(gn_bias_ptr + j, mask=inside, other=0.0).to(acc_ty)
    dsbias, scaled = tl.sum(total, 0), tl.sum(normed, 0)
    tl.store(d0 + j, tl.sum(dcweight, 0), mask=inside)
    tl.store(d1 + j, tl.sum(dcbias, 0), mask=inside)
    tl.store(d2 + j, gn_weight * scaled + gn_bias * dsbias, mask=inside)
    tl.store(d3 + j, dsbias, mask=inside)
    tl.store(d4 + j, sweight * scaled, mask=inside)
    tl.store(d5 + j, sweight * dsbias, mask=inside)


def _gate(weights: tuple[torch.Tensor, ...], eps: float = 0.0) -> Gate:
    return Gate(SHUFFLE, tuple(w.contiguous() for w in weights), eps)


def shuffle_attention_fwd(
    x: torch.Tensor, cweight: torch.Tensor, cbias: torch.Tensor, sweight: torch.Tensor, sbias: torch.Tensor,
    gn_weight: torch.Tensor, gn_bias: torch.Tensor, residual: torch.Tensor | None, activation: int, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = act(shuffle(x * gate) + residual); see `reference.shuffle_attention`.

    Returns y, and mean and rstd [N, C] in the order of x. Moves twice the bytes of x where planes fit in a tile, else 3
    times; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        gate = _gate((cweight, cbias, sweight, sbias, gn_weight, gn_bias), eps)
        return self_gate(x, layout, gate, residual, activation)


def shuffle_attention_bwd(
    grad: torch.Tensor, x: torch.Tensor, cweight: torch.Tensor, cbias: torch.Tensor, sweight: torch.Tensor,
    sbias: torch.Tensor, gn_weight: torch.Tensor, gn_bias: torch.Tensor, residual: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dx, dresidual, the six weights' gradients). Moves 3 times the bytes of x where planes fit in a tile, else 5."""
    with device_guard(x):
        x, layout = canonical(x)
        weights = (cweight, cbias, sweight, sbias, gn_weight, gn_bias)
        gate = _gate(weights)
        dx, dresidual, sums = self_gate_bwd(grad, x, layout, gate, mean, rstd, residual, activation)
        if not layout.N:
            return dx, dresidual, *(w.new_zeros(w.shape) for w in weights)
        K, groups = gate.width, layout.C // (2 * gate.width)
        dweights = tuple(w.new_empty(w.shape) for w in weights)
        block = vector_block(K, 64)
        launch(
            _weight_grads_kernel, cdiv(K, block),
            sums, mean, rstd, gate.parameters[2], gate.parameters[4], gate.parameters[5], *dweights,
            layout.C, K, layout.N * groups, groups,
            BLOCK_S=min(next_power_of_2(layout.N * groups), TILE // block), BLOCK_K=block,
        )  # fmt: skip
        return dx, dresidual, *dweights
