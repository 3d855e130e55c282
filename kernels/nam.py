"""Normalization-based attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ._launch import device_guard
from ._layout import accumulation_dtype, canonical
from ._self_gate import Gate, apply_gate, self_gate_bwd, statistics
from ._self_gate_tiles import AFFINE


def _gate(weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> tuple[Gate, torch.Tensor]:
    weight, bias = weight.to(dtype), bias.to(dtype)
    share = weight.abs()
    share /= share.sum()
    return Gate(AFFINE, (weight * share, bias * share, None, None, None, None), shared=True), share


def nam_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor | None, var: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y = act(x * sigmoid(bn(x) share) + residual), share = abs(weight) / sum(abs(weight)); y, mean [C], var [C].

    Moves 3 times the bytes of x, twice where mean and var are given; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        dtype = accumulation_dtype(x)
        gate, _ = _gate(weight, bias, dtype)
        if mean is None or var is None:
            mean, var = (t.view(-1) for t in statistics(x, layout, gate))
        else:
            mean, var = mean.to(dtype, copy=True), var.to(dtype, copy=True)
        return apply_gate(x, layout, gate, mean, (var + eps).rsqrt_(), residual, activation), mean, var


def nam_bwd(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None,
    mean: torch.Tensor, var: torch.Tensor, activation: int, eps: float, fixed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias). Moves 5 times the bytes of x, 3 times where the statistics are `fixed`."""
    with device_guard(x):
        x, layout = canonical(x)
        gate, share = _gate(weight, bias, mean.dtype)
        rstd = (var + eps).rsqrt_()
        dx, dresidual, sums = self_gate_bwd(grad, x, layout, gate, mean, rstd, residual, activation, fixed)
        if not layout.N:
            return dx, dresidual, torch.zeros_like(mean), torch.zeros_like(mean)
        assert sums is not None
        return dx, dresidual, share * rstd * sums[0, 1], share * sums[0, 0]
