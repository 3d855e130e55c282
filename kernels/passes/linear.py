"""A dense layer on the small vectors of each image, spread over blocks of its outputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import NONE, RELU, activate, activation_grad
from ..core.heuristics import cdiv, linear_blocks
from ..core.launch import launch


@triton.jit
def _linear_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    hidden_ptr,
    y_ptr,
    inputs,
    outputs,
    stride_o,
    stride_i,
    X_ROWS: tl.constexpr,
    Y_ROWS: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HIDDEN_ACTIVATION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
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


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    y: torch.Tensor,
    activation: int,
    *,
    transposed: bool = False,
    x_rows: int = 1,
    x_activation: int = NONE.value,
    y_rows: int = 1,
    hidden: torch.Tensor | None = None,
    hidden_activation: int = RELU.value,
) -> None:
    """Writes y; see `_linear_kernel`."""
    outputs, inputs = w.shape[:2]
    stride_o, stride_i = w.stride()[:2]
    if transposed:
        outputs, inputs, stride_o, stride_i = inputs, outputs, stride_i, stride_o
    block_o, block_i = linear_blocks(outputs, inputs)
    launch(
        _linear_kernel,
        y.numel() // (outputs * y_rows) * cdiv(outputs, block_o),
        x,
        w,
        b,
        hidden,
        y,
        inputs,
        outputs,
        stride_o,
        stride_i,
        X_ROWS=x_rows,
        Y_ROWS=y_rows,
        X_ACTIVATION=x_activation,
        ACTIVATION=activation,
        HIDDEN_ACTIVATION=hidden_activation,
        BLOCK_O=block_o,
        BLOCK_I=block_i,
    )
