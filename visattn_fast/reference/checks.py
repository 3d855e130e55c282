"""Checks of arguments, one for each kind of bad input.

A message names the argument, what it must be, and what it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .activations import Activation, GateActivation, Ties

# How public arguments spell the codes of the ops: the index of a spelling is its code.
ACTIVATIONS = (None, *(code.name.lower() for code in Activation if code is not Activation.NONE))
GATES = tuple(code.name.lower() for code in GateActivation)
TIES = tuple(code.name.lower() for code in Ties)

RESHAPES = {3: "; x[None] is one image [C, H, W] as a batch"}  # how a tensor of other dimensions becomes a map


def check_positive(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def check_positive_number(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a positive finite number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def check_odd(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is a positive odd int."""
    check_positive(name, value)
    if value % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the output keeps the input's size, got {value}")


def hidden_width(channels: int, reduction: int, names: tuple[str, str] = ("channels", "reduction")) -> int:
    """Returns the width of a bottleneck, ``channels // reduction``. Raises ValueError if it is zero."""
    check_positive(names[0], channels)
    check_positive(names[1], reduction)
    if channels < reduction:
        raise ValueError(f"{names[0]} must be at least {names[1]}={reduction}, got {channels}: no unit would be left")
    return channels // reduction


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless ``tensor`` is a tensor with a real floating-point dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(_named(f"{name} must be a torch.Tensor, got {type(tensor).__name__}"))
    if not tensor.dtype.is_floating_point:
        raise TypeError(_named(f"{name} must have a floating-point dtype, got {tensor.dtype}"))


def check_feature_map(x: Tensor, channels: int | None = None) -> None:
    """Raises unless x is floating-point, ``[N, C, H, W]`` with C, H, W >= 1, and C is ``channels`` if given."""
    if not isinstance(x, Tensor) and isinstance(x, Proxy):
        return  # torch.fx traces: there are no values yet, and no shape
    check_floating("x", x)
    shape = x.shape
    if len(shape) != 4:
        hint = RESHAPES.get(len(shape), "")
        raise ValueError(_named(f"x must have shape [N, C, H, W], got {len(shape)} dimensions: {tuple(shape)}{hint}"))
    _, c, h, w = shape
    if c == 0 or h == 0 or w == 0:
        raise ValueError(_named(f"x must have at least one channel and one pixel, got shape {tuple(shape)}"))
    if channels is not None and c != channels:
        raise ValueError(_named(f"x must have {channels} channels, as the weights have, got shape {tuple(shape)}"))


def _named(message: str) -> str:
    """Puts the qualified name of the accelerated module that makes the check before ``message``.

    It is looked for on the stack, so that only a call that fails pays for it.
    """
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module.__dict__.get("_qualified_name"):
            return f"{module._qualified_name}: {message}"
        frame = frame.f_back
    return message


def check_token_grid(x: Tensor, channels: int) -> None:
    """Raises unless x is floating-point, ``[N, H, W, C]`` with H, W >= 1, and C is ``channels``."""
    check_floating("x", x)
    if x.dim() != 4 or x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] != channels:
        raise ValueError(f"x must have shape [N, H, W, {channels}] with at least one token, got {list(x.shape)}")


def check_weight(name: str, weight: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raises unless ``weight`` is floating-point, on x's device, and has ``shape``, possibly followed by sizes of 1."""
    check_floating(name, weight)
    _check_fit(name, weight, weight.shape, shape, x.device)


def _check_fit(name: str, weight: Tensor, found: torch.Size, shape: tuple[int, ...], device: torch.device) -> None:
    """Checks shape and device for `check_weight`. The caller passes both: on small maps each look-up costs time."""
    if found != shape and found != shape + (1,) * (len(found) - len(shape)):
        raise ValueError(_named(f"{name} must have shape {list(shape)}, got {list(found)}"))
    if weight.device != device:
        raise ValueError(_named(f"{name} must be on the device of x, {device}, got {weight.device}"))


def check_bottleneck(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    names: tuple[str, str, str, str] = ("w1", "b1", "w2", "b2"),
) -> None:
    """Raises unless x is a feature map and w1 ``[R, C]``, b1 ``[R]``, w2 ``[C, R]``, b2 ``[C]`` fit it."""
    check_floating(names[0], w1)
    shape = w1.shape
    if len(shape) < 2 or shape[0] == 0:
        raise ValueError(f"{names[0]} must have shape [R, C] with R >= 1, got {list(shape)}")
    hidden, channels = shape[0], shape[1]
    check_feature_map(x, channels)
    check_floating(names[2], w2)
    device = x.device
    # On small maps each call costs time: only what does not fit is looked at again.
    here = x.is_cpu and w1.is_cpu and w2.is_cpu
    if len(shape) > 2 or not (here or w1.device == device):
        _check_fit(names[0], w1, shape, (hidden, channels), device)
    if w2.shape != (channels, hidden) or not (here or w2.device == device):
        _check_fit(names[2], w2, w2.shape, (channels, hidden), device)
    if b1 is not None:
        check_weight(names[1], b1, (hidden,), x)
    if b2 is not None:
        check_weight(names[3], b2, (channels,), x)


def check_coordinate_gates(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w_h: Tensor,
    b_h: Tensor | None,
    w_w: Tensor,
    b_w: Tensor | None,
    training: bool,
) -> None:
    """Raises unless x is a feature map and w1 ``[M, C]``, w_h, w_w ``[C, M]`` and vectors ``[M]``, ``[C]`` fit it."""
    check_bottleneck(x, w1, b1, w_h, b_h, ("w1", "b1", "w_h", "b_h"))
    hidden, channels = w1.shape[0], w1.shape[1]
    check_weight("w_w", w_w, (channels, hidden), x)
    if b_w is not None:
        check_weight("b_w", b_w, (channels,), x)
    norm = {"bn_weight": bn_weight, "bn_bias": bn_bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in norm.items():
        if vector is not None:
            check_weight(name, vector, (hidden,), x)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean and running_var must be given unless training")


def check_channel_kernel(x: Tensor, weight: Tensor) -> None:
    """Raises unless x is a feature map and ``weight`` is ``[1, 1, k]`` with odd k, on x's device."""
    check_feature_map(x)
    check_floating("weight", weight)
    if weight.dim() != 3:
        raise ValueError(f"weight must have shape [1, 1, k], got {list(weight.shape)}")
    check_odd("the kernel size of weight", int(weight.shape[2]))  # under torch.jit.trace sizes are tensors
    check_weight("weight", weight, (1, 1, weight.shape[2]), x)


def check_spatial_kernel(x: Tensor, wconv: Tensor, bias: Tensor | None) -> None:
    """Raises unless x is a feature map, ``wconv`` ``[1, 2, k, k]`` with odd k, and ``bias`` ``[1]`` or None."""
    check_feature_map(x)
    check_floating("wconv", wconv)
    if wconv.dim() != 4:
        raise ValueError(f"wconv must have shape [1, 2, k, k], got {list(wconv.shape)}")
    size = int(wconv.shape[3])  # under torch.jit.trace sizes are tensors
    check_odd("the kernel size of wconv", size)
    check_weight("wconv", wconv, (1, 2, size, size), x)
    if bias is not None:
        check_weight("bias", bias, (1,), x)


def check_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, training: bool, eps: float
) -> None:
    """Raises unless weights and statistics are ``[C]`` for x's C channels, and a variance exists or is given."""
    check_feature_map(x)
    check_positive_number("eps", eps)
    check_weight("weight", weight, (x.shape[1],), x)
    check_weight("bias", bias, (x.shape[1],), x)
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is not None:
            check_weight(name, value, (x.shape[1],), x)
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    if not training and (mean is None or var is None):
        raise ValueError("running_mean and running_var must be given outside of training")


def check_branches(
    v1: Tensor,
    v2: Tensor,
    w: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    training: bool,
) -> None:
    """Raises unless the arguments of `sk` fit each other and a training batch has at least two images."""
    check_floating("w", w)
    if w.dim() < 2 or w.shape[0] == 0:
        raise ValueError(f"w must have shape [d, C] with d >= 1, got {list(w.shape)}")
    hidden, channels = w.shape[:2]
    check_feature_map(v1, channels)
    check_same_map("v2", v2, v1)
    check_weight("w", w, (hidden, channels), v1)
    for name, weight, bias in (("1", w1, b1), ("2", w2, b2)):
        check_weight(f"w{name}", weight, (channels, hidden), v1)
        check_weight(f"b{name}", bias, (channels,), v1)
    check_weight("norm_weight", norm_weight, (hidden,), v1)
    check_weight("norm_bias", norm_bias, (hidden,), v1)
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None:
            check_weight(name, statistic, (hidden,), v1)
    if (training or running_mean is None or running_var is None) and v1.shape[0] < 2:
        raise ValueError(f"the batch norm of pooled values needs at least 2 images in training, got {v1.shape[0]}")


def check_same_map(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises unless ``tensor`` is floating-point and has x's shape and device."""
    check_floating(name, tensor)
    if tensor.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def check_residual(residual: Tensor | None, x: Tensor) -> None:
    """Raises unless ``residual`` is None, or is floating-point and has x's shape and device."""
    if residual is not None:
        check_same_map("residual", residual, x)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> int:
    """Returns the index of ``value`` in ``choices``. Raises ValueError if it is not there."""
    try:
        return choices.index(value)
    except ValueError:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}") from None
