"""The two-layer channel gate `sigmoid(W2 relu(W1 pooled + b1) + b2)`, forward and backward; or SiLU, hard sigmoid.

`pooled` is [N, C], or [N, B, C] for B branches through the same weights, which are summed before the sigmoid. `hidden`
keeps what the derivative of its activation is told from: relu(z), or of SiLU z itself.
The vectors are small and the weights are what moves, so each layer is spread over blocks of its outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._heuristics import cdiv, linear_blocks, vector_block
from ._launch import launch
from ._tiles import NONE, RELU, SIGMOID, activate, activation_grad


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


@triton.jit(do_not_specialize=["N"])
def _weight_grad_kernel(
    dz_ptr, hidden_ptr, dhidden_ptr, pooled_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, N, C, R,
    BRANCHES: tl.constexpr, HIDDEN_ACTIVATION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dw2 [C, R] = sum_n dz act(hidden)^T, dw1 [R, C] = sum_n dhidden pooled^T, biases: one tile, n in order."""
    acc_ty = dz_ptr.dtype.element_ty
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(0) // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R)
    dw1 = tl.zeros([BLOCK_C, BLOCK_R], acc_ty)
    dw2 = tl.zeros([BLOCK_C, BLOCK_R], acc_ty)
    db1 = tl.zeros([BLOCK_R], acc_ty)
    db2 = tl.zeros([BLOCK_C], acc_ty)
    for n in tl.range(0, N, loop_unroll_factor=8):
        dz = tl.load(dz_ptr + tl.cast(n, tl.int64) * C + c, mask=c < C, other=0.0)
        db2 += dz
        for branch in tl.static_range(BRANCHES):
            row = tl.cast(n, tl.int64) * BRANCHES + branch
            h = activate(tl.load(hidden_ptr + row * R + r, mask=r < R, other=0.0), HIDDEN_ACTIVATION)
            dh = tl.load(dhidden_ptr + row * R + r, mask=r < R, other=0.0)
            v = tl.load(pooled_ptr + row * C + c, mask=c < C, other=0.0)
            dw1 += v[:, None] * dh[None, :]
            dw2 += dz[:, None] * h[None, :]
            db1 += dh
    mask = (c < C)[:, None] & (r < R)[None, :]
    tl.store(dw1_ptr + r[None, :].to(tl.int64) * C + c[:, None], dw1, mask=mask)
    tl.store(dw2_ptr + c[:, None].to(tl.int64) * R + r[None, :], dw2, mask=mask)
    tl.store(db1_ptr + r, db1, mask=(r < R) & (tl.program_id(0) % blocks_c == 0))
    tl.store(db2_ptr + c, db2, mask=(c < C) & (tl.program_id(0) // blocks_c == 0))


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


def mlp_gate(
    pooled: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    gate: torch.Tensor, hidden_activation: int = RELU.value, gate_activation: int = SIGMOID.value,
) -> torch.Tensor:  # fmt: skip
    """Writes gate ([N, C], any dtype); returns hidden [N, R] or [N, B, R]. w1 [R, C], w2 [C, R], any strides."""
    branches = pooled.shape[1] if pooled.dim() == 3 else 1
    hidden = pooled.new_empty((*pooled.shape[:-1], w1.shape[0]))
    kept, taken = (RELU.value, NONE.value) if hidden_activation == RELU.value else (NONE.value, hidden_activation)
    _linear(pooled, w1, b1, hidden, kept)
    _linear(hidden, w2, b2, gate, gate_activation, x_rows=branches, x_activation=taken)
    return hidden


def mlp_gate_bwd(
    dz: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, pooled: torch.Tensor, hidden: torch.Tensor,
    hidden_activation: int = RELU.value,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """From dz [N, C], the gradient before the sigmoid: (dpooled like pooled, dw1, db1, dw2, db2)."""
    dhidden = _linear(
        dz, w2, None, torch.empty_like(hidden), NONE.value,
        transposed=True, y_rows=pooled.shape[1] if pooled.dim() == 3 else 1,
        hidden=hidden, hidden_activation=hidden_activation,
    )  # fmt: skip
    dpooled = _linear(dhidden, w1, None, torch.empty_like(pooled), NONE.value, transposed=True)
    return dpooled, *weight_grads(dz, dhidden, w1, w2, pooled, hidden, hidden_activation)


def weight_grads(
    dz: torch.Tensor, dhidden: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, pooled: torch.Tensor,
    hidden: torch.Tensor, hidden_activation: int = RELU.value,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dw1, db1, dw2, db2) from the gradients before both activations, dz [N, C] and dhidden like hidden."""
    (N, C), R = dz.shape, w1.shape[0]
    new = dz.new_empty if N else dz.new_zeros
    dw1, db1, dw2, db2 = new(w1.shape), new(R), new(w2.shape), new(C)
    block_c, block_r = vector_block(C, 32), vector_block(R, 16)
    launch(
        _weight_grad_kernel, cdiv(C, block_c) * cdiv(R, block_r) if N else 0,
        dz, hidden, dhidden, pooled, dw1, db1, dw2, db2, N, C, R, BRANCHES=pooled.shape[1] if pooled.dim() == 3 else 1,
        HIDDEN_ACTIVATION=hidden_activation, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=2,
    )  # fmt: skip
    return dw1, db1, dw2, db2
