"""PyTorch's list of operations that raise under ``torch.use_deterministic_algorithms(True)``.

Source: the documentation of `torch.use_deterministic_algorithms`, "will throw a RuntimeError", PyTorch 2.13. The names
are those of the operators that run then, mostly for gradients on CUDA. Reductions to one pixel by
``nn.AdaptiveAvgPool2d`` are means, and are not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_INTERPOLATED = ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
RAISING = {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    *(f"upsample_{mode}_backward" for mode in _INTERPOLATED),
    *(f"reflection_pad{dims}d_backward" for dims in (1, 2, 3)),
    "nll_loss_forward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "_embedding_bag_dense_backward",
    "put_",
    "put",
    "histc",
    "bincount",
    "median",
    "nanmedian",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "cumsum",
    "scatter_reduce",
    "scatter_reduce_",
    "resize_",
}


class Recorded(TorchDispatchMode):
    """Records the names of all operators that run, in ``names``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def deterministic_names(function: Callable[[], Any]) -> set[str]:
    """Returns the names of the operators that ``function()`` runs with deterministic algorithms alone."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with Recorded() as recorded:
            function()
    finally:
        torch.use_deterministic_algorithms(before)
    return recorded.names
