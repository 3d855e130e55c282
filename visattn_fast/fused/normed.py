"""A channel gate behind a batch norm, in a form that spares compilers and inference the map between them."""

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
    """``act(x * gate(mean(x)) + residual)`` for ``x = batch_norm(z)``, which is never stored.

    Norm and gate are affine in z: ``x * gate = (z - k) * scale + shift``, scale and shift per image and channel. Mean
    and variance of every image give the batch's statistics and the pooled means at once, and backward needs two sums
    per image and channel for both. So Inductor makes of it what it makes of the batch norm alone: a pass for sums and
    one for values, in each direction. In eager mode it is fused where the norm is not in training and no gradient is
    wanted, in two passes over z: its mean, and the affine form. Else it is slow there.

    Args:
        z: ``[N, C, H, W]``, any floating dtype: what the norm takes.
        weight, bias, running_mean, running_var: of the norm, ``[C]``.
        gate: as in `gate_channels`; what it is given and returns has z's dtype.
        training: whether the batch's statistics are taken, and the running ones updated.
        momentum, eps: of the norm; a momentum of 0 updates nothing.
        residual, activation: as in `se`.

    Raises: as `gate_channels`; ValueError, too, in training with a single value per channel, and outside of it without
        statistics.
    """
    check_batch_norm(z, weight, bias, running_mean, running_var, training, eps)
    check_residual(residual, z)
    code = check_choice("activation", activation, ACTIVATIONS)
    # Compiled, the plain form is Inductor's to fuse. A sum that is wider than z is PyTorch's.
    passes = not training and not torch.compiler.is_compiling() and (residual is None or residual.dtype == z.dtype)
    passes = passes and not recorded((z, weight, bias, residual)) and decide(z, GATE_CHANNELS).fused
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(wide), bias.to(wide)
    if training:
        # A value of the image itself keeps its sums from cancelling: (k - mean)^2 is at most H W times the variance.
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
    factor = checked(gate(pooled), (*z.shape[:2], 1, 1), "gate").to(wide)
    if passes and not recorded((factor,)):
        factor = factor.flatten(1)
        scale = gain * factor
        # Of the scale as it is rounded, so that a mean far from zero cancels.
        return channel_affine(z, scale, torch.addcmul(bias * factor, mean, scale, value=-1), residual, code)
    if passes:  # a gradient is wanted after all, of the gate's own parameters
        d = z.to(wide) - mean[:, None, None]
    y = d * (gain[:, None, None] * factor) + ((k - mean) * gain + bias)[..., None, None] * factor
    dtype = z.dtype if residual is None else torch.promote_types(z.dtype, residual.dtype)
    return reference.epilogue(y, residual, activation).to(dtype)
