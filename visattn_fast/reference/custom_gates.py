"""Gates whose mathematics the caller brings, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import Ties
from .cbam import global_maximum
from .checks import TIES, check_choice, check_feature_map
from .positions import over_positions

__all__ = ["gate_channels", "gate_twice"]


@over_positions
def gate_channels(x: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """``x * gate(mean(x))``, the mean over H and W.

    Args:
        x: ``[N, C, H, W]``.
        gate: ``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``, in differentiable PyTorch.

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype that is not floating-point.
    """
    check_feature_map(x)
    found = gate(x.mean((2, 3), keepdim=True))
    if isinstance(x, Tensor):  # not in a trace of torch.fx
        checked(found, (*x.shape[:2], 1, 1), "gate", x)
    return x * found


def gate_twice(
    x: Tensor,
    channel: Callable[[Tensor, Tensor], Tensor] | None,
    spatial: Callable[[Tensor], Tensor],
    ties: str = "first",
) -> Tensor:
    """``u = x * channel(mean(x), max(x))``, over H and W; then ``u * spatial([mean(u), max(u)])``, over C.

    Args:
        x: ``[N, C, H, W]``.
        channel: two ``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``, in differentiable PyTorch; None: no channel gate.
        spatial: ``[N, 2, H, W]`` -> ``[N, 1, H, W]``, in differentiable PyTorch.
        ties: the gradient of equal maxima: ``"first"``: all of it to the first, as `torch.max`; ``"even"``: an even
            share to each, as `torch.amax`.

    Raises:
        ValueError: a shape that does not fit, an unknown ``ties``.
        TypeError: a dtype that is not floating-point.
    """
    check_feature_map(x)
    even = check_choice("ties", ties, TIES) == Ties.EVEN
    if channel is not None:
        maximum = x.amax((2, 3), keepdim=True) if even else global_maximum(x)
        gate = channel(x.mean((2, 3), keepdim=True), maximum)
        if isinstance(x, Tensor):  # not in a trace of torch.fx
            checked(gate, (*x.shape[:2], 1, 1), "channel", x)
        x = x * gate
    maximum = x.amax(1, keepdim=True) if even else x.max(dim=1, keepdim=True).values
    gate = spatial(torch.cat([x.mean(1, keepdim=True), maximum], 1))
    if isinstance(x, Tensor):
        checked(gate, (x.shape[0], 1, *x.shape[2:]), "spatial", x)
    return x * gate


def checked(gate: Tensor, shape: tuple[int, ...], name: str, x: Tensor) -> Tensor:
    """Returns ``gate``, the result of ``name``. Raises ValueError unless it has ``shape`` and is on the device of x."""
    if gate.shape != shape:
        raise ValueError(f"{name} must return shape {list(shape)}, got {list(gate.shape)}")
    if gate.device != x.device:
        raise ValueError(f"{name} must return a tensor on the device of x, {x.device}, got {gate.device}")
    return gate
