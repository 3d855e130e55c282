"""One step of a module as a run for the clock: forward, backward or both; of the report and of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .timing import Prepared

Results = tuple[Tensor, ...]

# What each mode times.
MODES = {
    "forward": "forward as in training, under no_grad",
    "backward": "backward alone, after a forward that is not timed",
    "both": "a training step: forward and backward",
    "inference": "forward in eval mode, under inference_mode",
}
DEFAULT_MODES = ("forward", "both")
TRAINING = ("backward", "both")


def step(
    mode: str, function: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[Tensor], grad: Tensor
) -> Callable[[], Results]:
    """A run of ``y = function(*inputs)`` in one of `MODES`.

    It returns ``(y,)`` without gradients; in mode ``"backward"`` those of ``wanted`` for the gradient ``grad`` of y; in
    mode ``"both"`` y and those. Gradients are handed out, not added to ``.grad``. Whether a module is in eval mode is
    its owner's affair.
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
