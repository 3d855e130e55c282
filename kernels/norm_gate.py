"""A map scaled by the sigmoid of another one's batch norm: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ._launch import device_guard
from ._layout import Layout, accumulation_dtype, canonical
from ._self_gate import Gate, apply_gate, self_gate_bwd, statistics
from ._self_gate_tiles import AFFINE


def _maps(x: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Layout]:
    """x and m, dense in x's layout, and that of both."""
    x, layout = canonical(x)
    x = layout.dense(x)
    return x, layout.dense(m), canonical(x)[1]


def _gate(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> Gate:
    return Gate(AFFINE, (weight.to(dtype), bias.to(dtype), None, None, None, None), shared=True)


def norm_gate_fwd(
    x: torch.Tensor, m: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor | None,
    var: torch.Tensor | None, residual: torch.Tensor | None, activation: int, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = act(x * sigmoid(bn(m)) + residual); y, mean [C], var [C].

    Moves 4 times the bytes of x, 3 times where mean and var are given; one more for a residual.
    """
    with device_guard(x):
        x, m, layout = _maps(x, m)
        dtype = accumulation_dtype(x)
        gate = _gate(weight, bias, dtype)
        if mean is None or var is None:
            mean, var = (t.view(-1) for t in statistics(m, layout, gate))
        else:
            mean, var = mean.to(dtype, copy=True), var.to(dtype, copy=True)
        y = apply_gate(m, layout, gate, mean, (var + eps).rsqrt_(), residual, activation, x)
        return y, mean, var


def norm_gate_bwd(
    grad: torch.Tensor, x: torch.Tensor, m: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    residual: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, activation: int, eps: float, fixed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dm, dresidual, dweight, dbias). Moves 8 times the bytes of x, 5 times where the statistics are `fixed`."""
    with device_guard(x):
        x, m, layout = _maps(x, m)
        gate, rstd, dx = _gate(weight, bias, mean.dtype), (var + eps).rsqrt_(), layout.empty(x)
        dm, dresidual, sums = self_gate_bwd(grad, m, layout, gate, mean, rstd, residual, activation, fixed, x, dx)
        if not layout.N:
            return dx, dm, dresidual, torch.zeros_like(mean), torch.zeros_like(mean)
        assert sums is not None
        return dx, dm, dresidual, rstd * sums[0, 1], sums[0, 0]
