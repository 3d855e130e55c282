"""Batch norm followed by a channel gate, without materialising the normalised map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..backends import decide
from ..ops.autograd import recorded
from ..ops.channel_scale import channel_affine, channel_mean
from ..ops.gates import GATE_CHANNELS
from ..reference.batch_norm import update_running_statistics
from ..reference.checks import ACTIVATIONS, check_batch_norm, check_choice, check_residual
from ..reference.custom_gates import checked


def gate_normed_channels(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gate: Callable[[Tensor], Tensor],
    *,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Applies a batch norm and a channel gate: ``act(x * gate(mean(x)) + residual)`` for ``x = batch_norm(z)``.

    x is never stored, because norm and gate are affine in z: ``x * gate = (z - k) * scale + shift``, with scale and
    shift per image and channel. Mean and variance of every image give both the batch's statistics and the pooled means;
    backward needs two sums per image and channel for both.

    Compiled, Inductor makes as many passes as for the batch norm alone: one for sums and one for values, in each
    direction. In eager mode two fused passes over z serve (its mean, the affine form) if the norm is not in training
    and nothing needs a gradient; otherwise this function is slow there.

    Args:
        z: input of the norm, ``[N, C, H, W]``, any floating dtype.
        weight, bias, running_mean, running_var: parameters and statistics of the norm, ``[C]``.
        gate: ``[N, C, 1, 1]`` in z's dtype -> ``[N, C, 1, 1]`` in z's dtype, as in `gate_channels`.
        training: normalise with the batch's statistics and update the running ones in place.
        momentum: weight of this batch in the running statistics; 0: they stay as they are.
        eps: added to the variance.
        residual: added before the activation; z's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in z's dtype; a residual of another dtype promotes the result.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation, another shape returned by ``gate``, a
            single value per channel in training, no running statistics outside training.
        RuntimeError: the backend asked for cannot serve this call.
    """
    check_batch_norm(z, weight, bias, running_mean, running_var, training, eps)
    check_residual(residual, z)
    code = check_choice("activation", activation, ACTIVATIONS)
    # Compiled, Inductor fuses the plain form. A residual of another dtype is left to PyTorch, which promotes the sum.
    passes = not training and not torch.compiler.is_compiling() and (residual is None or residual.dtype == z.dtype)
    passes = passes and not recorded((z, weight, bias, residual)) and decide(z, GATE_CHANNELS).fused
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(wide), bias.to(wide)
    if training:
        # Sums relative to a value k of the same image and channel do not cancel: (k - mean)^2 is at most H W times the
        # variance.
        k = z[:, :, :1, :1].detach().to(wide)
        d = z.to(wide) - k
        offset = d.mean((2, 3))
        k, means = k[:, :, 0, 0], offset + k[:, :, 0, 0]
        mean = means.mean(0)
        var = (d.square().mean((2, 3)) - offset.square() + (means - mean).square()).mean(0)
        if z.shape[0]:
            count = z.numel() // z.shape[1]
            update_running_statistics(running_mean, running_var, mean.detach(), var.detach(), count, momentum)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.to(wide), running_var.to(wide)
        k, d = mean, z if passes else z.to(wide) - mean[:, None, None]
        means = channel_mean(z) if passes else d.mean((2, 3)) + mean
    gain = torch.rsqrt(var + eps) * weight
    pooled = ((means - mean) * gain + bias).to(z.dtype)[:, :, None, None]
    factor = checked(gate(pooled), (*z.shape[:2], 1, 1), "gate", z).to(wide)
    if passes and not recorded((factor,)):
        factor = factor.flatten(1)
        scale = gain * factor
        # The shift uses the rounded scale, so that a mean far from zero cancels.
        return channel_affine(z, scale, torch.addcmul(bias * factor, mean, scale, value=-1), residual, code)
    if passes:  # the gate's own parameters need a gradient
        d = z.to(wide) - mean[:, None, None]
    y = d * (gain[:, None, None] * factor) + ((k - mean) * gain + bias)[..., None, None] * factor
    dtype = z.dtype if residual is None else torch.promote_types(z.dtype, residual.dtype)
    return reference.epilogue(y, residual, activation).to(dtype)
