"""How every kernel is launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def launch(kernel: Any, programs: int, *args: Any, parts: int = 1, **meta: Any) -> None:
    """Runs the kernel on a grid of (programs, parts). An empty batch makes no programs, and no launch.

    Only the first axis may be longer than 65535; parts of a reduction are few.
    """
    if programs:
        kernel[(programs, parts)](*args, **meta)


def device_guard(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes x's device current: Triton launches on the current device, not on its arguments' one."""
    if x.is_cuda:
        return torch.cuda.device_of(x)
    if x.is_xpu:
        return torch.xpu.device_of(x)
    return nullcontext()


def multiprocessors(device: torch.device) -> int:
    """How many the device has, each of which runs a program; of a device that is not there, as many as an A100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108
