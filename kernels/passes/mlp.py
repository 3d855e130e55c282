"""The two-layer channel gate `sigmoid(W2 relu(W1 pooled + b1) + b2)`, forward and backward; or SiLU, hard sigmoid.

`pooled` is [N, C], or [N, B, C] for B branches through the same weights, which are summed before the sigmoid. `hidden`
keeps what the derivative of its activation is told from: relu(z), or of SiLU z itself.
Where the weights are few, one program makes both layers of an image: a launch less, which small maps wait for. Else
they are what moves, and each layer is spread over blocks of its outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..core.heuristics import cdiv, linear_blocks, next_power_of_2, registers_for
from ..core.launch import launch
from ..core.layout import contiguous
from ..core.tiles import NONE, RELU, SIGMOID, activate, activation_grad, gate_grad
from .pool import Parts, combine, combine_parts, parts_max, parts_sum
from .weight_grads import MLPGrads, mlp_grads

FUSED = 1 << 15  # weights of a layer that one program goes through
FUSED_TILE = 4096  # of which it holds as many at once, or for two branches half as many
FUSED_PARTS = 64  # of a sum that it makes itself


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, b_ptr, hidden_ptr, y_ptr, inputs, outputs, stride_o, stride_i,
    X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, X_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    HIDDEN_ACTIVATION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y [N, Y_ROWS, outputs] = act(w (sum over rows of x_act(x [N, X_ROWS, inputs])) + b) [* hidden_act'(hidden)]."""
    acc_ty = x_ptr.dtype.element_ty
    blocks = tl.cdiv(outputs, BLOCK_O)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    o = tl.program_id(0) % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    acc = tl.zeros([BLOCK_O, BLOCK_I], acc_ty)
    for start in range(0, inputs, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        v = tl.zeros([BLOCK_I], acc_ty)
        for row in tl.static_range(X_ROWS):
            x = tl.load(x_ptr + (n * X_ROWS + row) * inputs + i, mask=i < inputs, other=0.0)
            v += activate(x, X_ACTIVATION)
        offsets = o[:, None].to(tl.int64) * stride_o + i[None, :].to(tl.int64) * stride_i
        w = tl.load(w_ptr + offsets, mask=(o < outputs)[:, None] & (i < inputs)[None, :], other=0.0).to(acc_ty)
        acc += w * v[None, :]
    y = tl.sum(acc, 1)
    if b_ptr is not None:
        y += tl.load(b_ptr + o, mask=o < outputs, other=0.0).to(acc_ty)
    y = activate(y, ACTIVATION)
    for row in tl.static_range(Y_ROWS):
        out = (n * Y_ROWS + row) * outputs + o
        if hidden_ptr is not None:
            h = tl.load(hidden_ptr + out, mask=o < outputs, other=0.0)
            tl.store(y_ptr + out, activation_grad(y, h, HIDDEN_ACTIVATION), mask=o < outputs)
        else:
            tl.store(y_ptr + out, y, mask=o < outputs)


@triton.jit
def _weights(w_ptr, c, r, C, R, OF_FIRST: tl.constexpr, acc_ty: tl.constexpr):
    """A tile [BLOCK_R, BLOCK_C] of the weights of the first layer, [R, C], or of the second one, [C, R]."""
    offsets = r[:, None] * C + c[None, :] if OF_FIRST else c[None, :] * R + r[:, None]  # few, so 32 bits will do
    return tl.load(w_ptr + offsets, mask=(r < R)[:, None] & (c < C)[None, :], other=0.0).to(acc_ty)


@triton.jit
def _mlp_gate_kernel(
    parts_ptr, parts_argmax_ptr, pooled_ptr, argmax_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, hidden_ptr, gate_ptr,
    parts, divisor, C, R,
    BRANCHES: tl.constexpr, KEPT: tl.constexpr, TAKEN: tl.constexpr, GATE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Both layers of one image: hidden [BRANCHES, R] and gate [C]; before that, pooled from its parts, if there are.

    Each branch's part of the first layer stays in registers until all channels are in.
    """
    acc_ty = hidden_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    inside = r < R
    taken = tl.zeros([BLOCK_R], acc_ty)
    for branch in tl.static_range(BRANCHES):
        acc = tl.zeros([BLOCK_R, BLOCK_C], acc_ty)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            if pooled_ptr is None:
                v = tl.load(parts_ptr + (n * BRANCHES + branch) * C + c, mask=c < C, other=0.0)
            elif branch == 0:
                v = parts_sum(parts_ptr, n, c, C, parts, BRANCHES, BLOCK_S) / divisor
                tl.store(pooled_ptr + n * BRANCHES * C + c, v, mask=c < C)
            else:
                v, first = parts_max(parts_ptr, parts_argmax_ptr, n, c, C, parts, False, BLOCK_S)
                tl.store(pooled_ptr + (n * BRANCHES + 1) * C + c, v, mask=c < C)
                tl.store(argmax_ptr + n * C + c, first, mask=c < C)
                v = tl.where(c < C, v, 0.0)
            acc += _weights(w1_ptr, c, r, C, R, True, acc_ty) * v[None, :]
        h = tl.sum(acc, 1)
        if b1_ptr is not None:
            h += tl.load(b1_ptr + r, mask=inside, other=0.0).to(acc_ty)
        h = activate(h, KEPT)
        tl.store(hidden_ptr + (n * BRANCHES + branch) * R + r, h, mask=inside)
        taken += activate(h, TAKEN)
    taken = tl.where(inside, taken, 0.0)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        z = tl.sum(_weights(w2_ptr, c, r, C, R, False, acc_ty) * taken[:, None], 0)
        if b2_ptr is not None:
            z += tl.load(b2_ptr + c, mask=c < C, other=0.0).to(acc_ty)
        tl.store(gate_ptr + n * C + c, activate(z, GATE), mask=c < C)


@triton.jit
def _mlp_gate_bwd_kernel(
    parts_ptr, gate_ptr, w1_ptr, w2_ptr, hidden_ptr, dz_ptr, dhidden_ptr, dpooled_ptr, parts, C, R,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Both layers of one image, backward: dz [C] from parts of the gate's gradient, dhidden and dpooled."""
    acc_ty = hidden_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_C], acc_ty)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        dz = parts_sum(parts_ptr, n, c, C, parts, 1, BLOCK_S).to(acc_ty)
        if gate_ptr is not None:
            dz *= gate_grad(tl.load(gate_ptr + n * C + c, mask=c < C, other=0.0).to(acc_ty), GATE)
        if dz_ptr is not None:
            tl.store(dz_ptr + n * C + c, dz, mask=c < C)
        acc += _weights(w2_ptr, c, r, C, R, False, acc_ty) * dz[None, :]
    through = tl.sum(acc, 1)
    for branch in tl.static_range(BRANCHES):
        row = n * BRANCHES + branch
        h = tl.load(hidden_ptr + row * R + r, mask=r < R, other=0.0)
        dh = tl.where(r < R, activation_grad(through, h, HIDDEN_ACTIVATION), 0.0)
        tl.store(dhidden_ptr + row * R + r, dh, mask=r < R)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            w1 = _weights(w1_ptr, c, r, C, R, True, acc_ty)
            tl.store(dpooled_ptr + row * C + c, tl.sum(w1 * dh[:, None], 0), mask=c < C)


def _linear(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, activation: int, *,
    transposed: bool = False, x_rows: int = 1, x_activation: int = NONE.value, y_rows: int = 1,
    hidden: torch.Tensor | None = None, hidden_activation: int = RELU.value,
) -> torch.Tensor:  # fmt: skip
    outputs, inputs = w.shape[:2]
    stride_o, stride_i = w.stride()[:2]
    if transposed:
        outputs, inputs, stride_o, stride_i = inputs, outputs, stride_i, stride_o
    block_o, block_i = linear_blocks(outputs, inputs)
    launch(
        _linear_kernel, y.numel() // (outputs * y_rows) * cdiv(outputs, block_o),
        x, w, b, hidden, y, inputs, outputs, stride_o, stride_i,
        X_ROWS=x_rows, Y_ROWS=y_rows, X_ACTIVATION=x_activation, ACTIVATION=activation,
        HIDDEN_ACTIVATION=hidden_activation, BLOCK_O=block_o, BLOCK_I=block_i,
    )  # fmt: skip
    return y


def _fused(C: int, R: int, parts: int, branches: int) -> dict[str, int] | None:
    """The blocks of both layers in one program an image; None where weights, or parts of its vectors, are too many."""
    rows = max(next_power_of_2(R), next_power_of_2(parts))
    if C * max(R, parts) > FUSED or rows > FUSED_TILE // 32 or parts > FUSED_PARTS:
        return None
    block_c = min(next_power_of_2(C), FUSED_TILE // branches // rows)
    blocks = {"BLOCK_C": block_c, "BLOCK_R": next_power_of_2(R), "BLOCK_S": next_power_of_2(parts)}
    return blocks | {"num_warps": min(max(block_c * rows * branches // 1024, 1), 4)}


def _kept_and_taken(hidden_activation: int) -> tuple[int, int]:
    """What becomes of z before it is kept, and of what is kept before the second layer."""
    relu = hidden_activation == RELU.value
    return (RELU.value, NONE.value) if relu else (NONE.value, hidden_activation)


def pooled_gate(
    parts: Parts, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    gate: torch.Tensor, hidden_activation: int = RELU.value, gate_activation: int = SIGMOID.value,
) -> tuple[torch.Tensor, Any, torch.Tensor]:  # fmt: skip
    """Writes gate ([N, C], any dtype); returns pooled and argmax, as `combine_parts`, and hidden [N, R] or [N, B, R].

    w1 [R, C], w2 [C, R], any strides.
    """
    (R, C), b1, b2 = w1.shape[:2], contiguous(b1), contiguous(b2)
    kept, taken = _kept_and_taken(hidden_activation)
    if _fused(C, R, parts.slots, parts.branches) is None:
        parts = Parts(*combine_parts(parts), 1, 1)
    several, branches = not parts.complete, parts.branches
    pooled, argmax = parts.empty() if several else (parts.values, parts.argmax)
    hidden = pooled.new_empty((*pooled.shape[:-1], R))
    if (blocks := _fused(C, R, parts.slots, parts.branches)) is None:
        _linear(pooled, w1, b1, hidden, kept)
        _linear(hidden, w2, b2, gate, gate_activation, x_rows=branches, x_activation=taken)
        return pooled, argmax, hidden
    launch(
        _mlp_gate_kernel, parts.images,
        parts.values, parts.argmax if several else None, pooled if several else None, argmax if several else None,
        w1.contiguous(), b1, w2.contiguous(), b2, hidden, gate, parts.slots, parts.divisor, C, R,
        BRANCHES=branches, KEPT=kept, TAKEN=taken, GATE=gate_activation, **blocks,
    )  # fmt: skip
    return pooled, argmax, hidden


def gate_mlp_bwd(
    parts: torch.Tensor, gate: torch.Tensor | None, w1: torch.Tensor, w2: torch.Tensor, pooled: torch.Tensor,
    hidden: torch.Tensor, hidden_activation: int = RELU.value, gate_activation: int = SIGMOID.value,
    biases: bool = True,
) -> tuple[torch.Tensor, MLPGrads]:  # fmt: skip
    """From parts [N, S, C] of the gate's gradient: (dpooled like pooled, the weights' gradients, yet to be written).

    Without a gate, the sum of the parts is the gradient before the gate's activation.
    """
    (N, S, C), R = parts.shape, w1.shape[0]
    rows = pooled.shape[1] if pooled.dim() == 3 else 1
    dhidden, dpooled = torch.empty_like(hidden), torch.empty_like(pooled)
    if _fused(C, R, S, rows) is None and (S > 1 or gate is not None):
        parts, gate, S = combine(parts, gate, pooled.new_empty((N, C)), gate_activation)[:, None], None, 1
    known = S == 1 and gate is None
    dz = parts[:, 0] if known else pooled.new_empty((N, C))
    if (blocks := _fused(C, R, S, rows)) is None:
        _linear(
            dz, w2, None, dhidden, NONE.value, transposed=True, y_rows=rows, hidden=hidden,
            hidden_activation=hidden_activation,
        )  # fmt: skip
        _linear(dhidden, w1, None, dpooled, NONE.value, transposed=True)
    else:
        launch(
            _mlp_gate_bwd_kernel, N,
            parts, gate, w1.contiguous(), w2.contiguous(), hidden, None if known else dz, dhidden, dpooled, S, C, R,
            BRANCHES=rows, HIDDEN_ACTIVATION=hidden_activation, GATE=gate_activation, **blocks,
            **registers_for(parts, 16),
        )  # fmt: skip
    return dpooled, mlp_grads(dz, dhidden, w1, w2, pooled, hidden, hidden_activation, biases)
