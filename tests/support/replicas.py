"""DataParallel's replicas and threads, on CPUs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn


def replica(module: nn.Module) -> nn.Module:
    """Returns what DataParallel makes of a module for another device: parameters are tensors in the instances."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        setattr(twin, name, None if parameter is None else parameter * 1)
    return twin


def stand_in_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `torch.nn.parallel.parallel_apply` run on CPU tensors, in the threads that it starts for GPUs."""
    fakes = {
        "current_stream": lambda device: contextlib.nullcontext(),
        "device_index": lambda device: contextlib.nullcontext(),
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cpu"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.accelerator, name, fake)
