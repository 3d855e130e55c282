"""How every kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def launch(kernel: Any, programs: int, *args: Any, splits: int = 1, **meta: Any) -> None:
    """Runs the kernel on a grid of (programs, splits); an empty batch has no programs, and no launch.

    Only the first axis may be longer than 65535; the programs that share a reduction are few. Multiplications and
    additions are fused: from Triton 3.10 on the default is not to, and 3.9 warns of it.
    """
    if programs:
        kernel[(programs, splits)](*args, enable_fp_fusion=True, **meta)


def device_guard(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes x's device current: Triton launches on the current device, not on that of the arguments."""
    if x.is_cuda:
        return torch.cuda.device_of(x)
    if x.is_xpu:
        return torch.xpu.device_of(x)
    return nullcontext()
