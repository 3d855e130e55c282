"""The two-layer channel gate `sigmoid(W2 relu(W1 pooled + b1) + b2)`, forward and backward; or SiLU, hard sigmoid.

`pooled` is [N, C], or [N, B, C] for B branches that go through the same weights and are summed before the sigmoid.
`hidden` saves what the derivative of its activation is computed from: relu(z), or z itself for SiLU.
If the weights are few, one program makes both layers of an image: one launch less, which is what small maps wait for.
Otherwise the weights are what moves, and each layer is spread over blocks of its outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, RELU, SIGMOID, activate, activation_grad, gate_grad
from ..core.heuristics import next_power_of_2, registers_for
from ..core.launch import launch
from ..core.layout import contiguous
from .linear import linear
from .partials import Partials, combine, combine_pooled, partials_max, partials_sum
from .weight_grads import MLPGrads, empty_mlp_grads

FUSED = 1 << 15  # weights of a layer that one program goes through
FUSED_TILE = 4096  # weights that it holds at once; for two branches half as many
FUSED_PARTIALS = 64  # partials of a sum that it adds up itself


class MLPWeights(NamedTuple):
    """The weights of both layers, w1 [R, C] and w2 [C, R], and their biases or None, as kernels take them."""

    w1: Any
    b1: Any
    w2: Any
    b2: Any


class FusedBlocks(NamedTuple):
    """Channels and hidden units that a program holds at once, and splits that it adds; kernels' ``BLOCKS``."""

    C: int
    R: int
    S: int
    num_warps: int


@triton.jit
def _load_weights(w_ptr, c, r, C, R, FIRST: tl.constexpr, acc_ty: tl.constexpr):
    """Returns a tile [BLOCK_R, BLOCK_C] of the weights of the first layer, [R, C], or of the second one, [C, R]."""
    offsets = r[:, None] * C + c[None, :] if FIRST else c[None, :] * R + r[:, None]  # few, so 32 bits will do
    return tl.load(w_ptr + offsets, mask=(r < R)[:, None] & (c < C)[None, :], other=0.0).to(acc_ty)


@triton.jit
def _mlp_gate_kernel(
    partials_ptr,
    partials_argmax_ptr,
    pooled_ptr,
    argmax_ptr,
    weights,
    hidden_ptr,
    gate_ptr,
    splits,
    divisor,
    C,
    R,
    BRANCHES: tl.constexpr,
    SAVED_ACTIVATION: tl.constexpr,
    APPLIED_ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Both layers of one image: hidden [BRANCHES, R] and gate [C]. Before that, pooled, unless pooled_ptr is None.

    Each branch's share of the first layer stays in registers until all channels are in. hidden is saved after
    SAVED_ACTIVATION; the second layer applies APPLIED_ACTIVATION to it.
    """
    BLOCK_C: tl.constexpr = BLOCKS.C
    BLOCK_R: tl.constexpr = BLOCKS.R
    acc_ty = hidden_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    inside = r < R
    applied = tl.zeros([BLOCK_R], acc_ty)
    for branch in tl.static_range(BRANCHES):
        acc = tl.zeros([BLOCK_R, BLOCK_C], acc_ty)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            if pooled_ptr is None:
                v = tl.load(partials_ptr + (n * BRANCHES + branch) * C + c, mask=c < C, other=0.0)
            elif branch == 0:
                v = partials_sum(partials_ptr, n, c, C, splits, BRANCHES, BLOCKS.S) / divisor
                tl.store(pooled_ptr + n * BRANCHES * C + c, v, mask=c < C)
            else:
                v, first = partials_max(partials_ptr, partials_argmax_ptr, n, c, C, splits, False, BLOCKS.S)
                tl.store(pooled_ptr + (n * BRANCHES + 1) * C + c, v, mask=c < C)
                tl.store(argmax_ptr + n * C + c, first, mask=c < C)
                v = tl.where(c < C, v, 0.0)
            acc += _load_weights(weights.w1, c, r, C, R, True, acc_ty) * v[None, :]
        h = tl.sum(acc, 1)
        if weights.b1 is not None:
            h += tl.load(weights.b1 + r, mask=inside, other=0.0).to(acc_ty)
        h = activate(h, SAVED_ACTIVATION)
        tl.store(hidden_ptr + (n * BRANCHES + branch) * R + r, h, mask=inside)
        applied += activate(h, APPLIED_ACTIVATION)
    applied = tl.where(inside, applied, 0.0)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        z = tl.sum(_load_weights(weights.w2, c, r, C, R, False, acc_ty) * applied[:, None], 0)
        if weights.b2 is not None:
            z += tl.load(weights.b2 + c, mask=c < C, other=0.0).to(acc_ty)
        tl.store(gate_ptr + n * C + c, activate(z, GATE_ACTIVATION), mask=c < C)


@triton.jit
def _mlp_gate_bwd_kernel(
    partials_ptr,
    gate_ptr,
    w1_ptr,
    w2_ptr,
    hidden_ptr,
    dz_ptr,
    dhidden_ptr,
    dpooled_ptr,
    splits,
    C,
    R,
    BRANCHES: tl.constexpr,
    HIDDEN_ACTIVATION: tl.constexpr,
    GATE_ACTIVATION: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Both layers of one image, backward: dz [C] from partials of the gate's gradient, then dhidden and dpooled."""
    BLOCK_C: tl.constexpr = BLOCKS.C
    BLOCK_R: tl.constexpr = BLOCKS.R
    acc_ty = hidden_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_C], acc_ty)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        dz = partials_sum(partials_ptr, n, c, C, splits, 1, BLOCKS.S).to(acc_ty)
        if gate_ptr is not None:
            dz *= gate_grad(tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(acc_ty), GATE_ACTIVATION)
        if dz_ptr is not None:
            tl.store(dz_ptr + n * C + c, dz, mask=c < C)
        acc += _load_weights(w2_ptr, c, r, C, R, False, acc_ty) * dz[None, :]
    through = tl.sum(acc, 1)
    for branch in tl.static_range(BRANCHES):
        row = n * BRANCHES + branch
        h = tl.load(hidden_ptr + row * R + r, mask=r < R, other=0.0)
        dh = tl.where(r < R, activation_grad(through, h, HIDDEN_ACTIVATION), 0.0)
        tl.store(dhidden_ptr + row * R + r, dh, mask=r < R)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            w1 = _load_weights(w1_ptr, c, r, C, R, True, acc_ty)
            tl.store(dpooled_ptr + row * C + c, tl.sum(w1 * dh[:, None], 0), mask=c < C)


def _fused_blocks(C: int, R: int, splits: int, branches: int) -> FusedBlocks | None:
    """Returns the blocks for one program an image; None if there are too many weights or partials of its vectors."""
    rows = max(next_power_of_2(R), next_power_of_2(splits))
    if C * max(R, splits) > FUSED or rows > FUSED_TILE // 32 or splits > FUSED_PARTIALS:
        return None
    block_c = min(next_power_of_2(C), FUSED_TILE // branches // rows)
    num_warps = min(max(block_c * rows * branches // 1024, 1), 4)
    return FusedBlocks(block_c, next_power_of_2(R), next_power_of_2(splits), num_warps)


def saved_and_applied(hidden_activation: int) -> tuple[int, int]:
    """Returns the activation before hidden is saved, and the one that the second layer applies to what is saved."""
    relu = hidden_activation == RELU.value
    return (RELU.value, NONE.value) if relu else (NONE.value, hidden_activation)


def pooled_gate(
    partials: Partials,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    gate: torch.Tensor,
    hidden_activation: int = RELU.value,
    gate_activation: int = SIGMOID.value,
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Writes gate, [N, C] in any dtype. Returns pooled and argmax, as `combine_pooled`, and hidden [N, R] or [N, B, R].

    w1 [R, C] and w2 [C, R] have any strides.
    """
    (R, C), b1, b2 = w1.shape[:2], contiguous(b1), contiguous(b2)
    saved, applied = saved_and_applied(hidden_activation)
    if _fused_blocks(C, R, partials.splits, partials.branches) is None:
        partials = Partials(*combine_pooled(partials), 1, 1)
    several, branches = not partials.complete, partials.branches
    pooled, argmax = partials.empty_results() if several else (partials.values, partials.argmax)
    hidden = pooled.new_empty((*pooled.shape[:-1], R))
    if (blocks := _fused_blocks(C, R, partials.splits, partials.branches)) is None:
        linear(pooled, w1, b1, hidden, saved)
        linear(hidden, w2, b2, gate, gate_activation, x_rows=branches, x_activation=applied)
        return pooled, argmax, hidden
    launch(
        _mlp_gate_kernel,
        partials.images,
        partials.values,
        partials.argmax if several else None,
        pooled if several else None,
        argmax if several else None,
        MLPWeights(w1.contiguous(), b1, w2.contiguous(), b2),
        hidden,
        gate,
        partials.splits,
        partials.divisor,
        C,
        R,
        BRANCHES=branches,
        SAVED_ACTIVATION=saved,
        APPLIED_ACTIVATION=applied,
        GATE_ACTIVATION=gate_activation,
        BLOCKS=blocks,
        num_warps=blocks.num_warps,
    )
    return pooled, argmax, hidden


def pooled_gate_bwd(
    partials: torch.Tensor,
    gate: torch.Tensor | None,
    w1: torch.Tensor,
    w2: torch.Tensor,
    pooled: torch.Tensor,
    hidden: torch.Tensor,
    hidden_activation: int = RELU.value,
    gate_activation: int = SIGMOID.value,
    biases: bool = True,
) -> tuple[torch.Tensor, MLPGrads]:
    """Returns dpooled, like pooled, and the weights' gradients, which are still to be written.

    Takes partials [N, S, C] of the gate's gradient; without a gate, of the gradient before the gate's activation.
    """
    (N, S, C), R = partials.shape, w1.shape[0]
    rows = pooled.shape[1] if pooled.dim() == 3 else 1
    dhidden, dpooled = torch.empty_like(hidden), torch.empty_like(pooled)
    if _fused_blocks(C, R, S, rows) is None and (S > 1 or gate is not None):
        partials, gate, S = combine(partials, gate, pooled.new_empty((N, C)), gate_activation)[:, None], None, 1
    known = S == 1 and gate is None
    dz = partials[:, 0] if known else pooled.new_empty((N, C))
    if (blocks := _fused_blocks(C, R, S, rows)) is None:
        linear(
            dz,
            w2,
            None,
            dhidden,
            NONE.value,
            transposed=True,
            y_rows=rows,
            hidden=hidden,
            hidden_activation=hidden_activation,
        )
        linear(dhidden, w1, None, dpooled, NONE.value, transposed=True)
    else:
        launch(
            _mlp_gate_bwd_kernel,
            N,
            partials,
            gate,
            w1.contiguous(),
            w2.contiguous(),
            hidden,
            None if known else dz,
            dhidden,
            dpooled,
            S,
            C,
            R,
            BRANCHES=rows,
            HIDDEN_ACTIVATION=hidden_activation,
            GATE_ACTIVATION=gate_activation,
            BLOCKS=blocks,
            num_warps=blocks.num_warps,
            **registers_for(partials, 16),
        )
    return dpooled, empty_mlp_grads(dz, dhidden, w1, w2, pooled, hidden, hidden_activation, biases)
