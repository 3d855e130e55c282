"""Activations of values in registers, and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

NONE, RELU, SILU, SIGMOID, HARD_SIGMOID = map(tl.constexpr, range(5))  # the ops use the codes of the first three, too
GATE_ACTIVATIONS = (SIGMOID.value, HARD_SIGMOID.value)  # by the code that an op takes for its gate


@triton.jit
def sigmoid(v):
    """Returns 1 / (1 + exp(-v)); the exponential does not overflow."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1 + e)


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """Returns the activation of v; NaN stays NaN."""
    if ACTIVATION == RELU:
        v = tl.where(v <= 0, 0.0, v)
    elif ACTIVATION == SILU:
        v = v * sigmoid(v)
    elif ACTIVATION == SIGMOID:
        v = sigmoid(v)
    elif ACTIVATION == HARD_SIGMOID:
        v = v + 3
        v = tl.where(v < 0, 0.0, tl.where(v > 6, 6.0, v)) / 6
    return v


@triton.jit
def activation_grad(g, v, ACTIVATION: tl.constexpr):
    """Returns g * activate'(v), for ReLU and SiLU."""
    if ACTIVATION == RELU:
        g = tl.where(v <= 0, 0.0, g)
    elif ACTIVATION == SILU:
        s = sigmoid(v)
        g = g * (s * (1 + v * (1 - s)))
    return g


@triton.jit
def gate_grad(s, ACTIVATION: tl.constexpr):
    """Returns the derivative of the sigmoid or of the hard sigmoid, computed from its value s."""
    if ACTIVATION == HARD_SIGMOID:
        return tl.where((s > 0) & (s < 1), tl.full([], 1 / 6, s.dtype), 0.0)  # a plain number would be float32
    return s * (1 - s)
