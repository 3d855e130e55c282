"""One step of a module as a run for the clock: forward, backward, both, or inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .timing import Prepared

Results = tuple[Tensor, ...]

# Mode -> what is timed.
MODES = {
    "forward": "forward in training mode, under no_grad",
    "backward": "backward alone, after a forward that is not timed",
    "both": "a training step: forward and backward",
    "inference": "forward in eval mode, under inference_mode",
}
DEFAULT_MODES = ("forward", "both")
TRAINING = ("backward", "both")


def step(
    mode: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[Tensor], grad: Tensor
) -> Callable[[], Results]:
    """Returns a run of ``y = function(*inputs)`` in one of `MODES`.

    The run returns ``(y,)`` in the modes without gradients; in mode ``"backward"`` the gradients of ``wanted``, where
    ``grad`` is the gradient of y; in mode ``"both"`` y and these gradients. It leaves ``.grad`` alone. The caller
    puts the module in training or eval mode.
    """

    def forward() -> Results:
        with torch.no_grad():
            return (function(*inputs),)

    def inference() -> Results:
        with torch.inference_mode():
            return (function(*inputs),)

    def both() -> Results:
        y = function(*inputs)
        return (y, *torch.autograd.grad(y, wanted, grad))

    def prepared() -> Callable[[], Results]:
        y = function(*inputs)
        return lambda: torch.autograd.grad(y, wanted, grad)

    runs: dict[str, Callable[[], Results]] = {"forward": forward, "inference": inference, "both": both}
    return Prepared(prepared) if mode == "backward" else runs[mode]
