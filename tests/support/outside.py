"""Modules of other libraries, for tests that compare ours with them; a missing library skips the test."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

# At import Ultralytics looks for the network, and writes its settings.
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())

_needs_torchvision = ("peft", "ptflops", "segmentation_models_pytorch", "timm", "torchvision", "ultralytics")


def library(name: str) -> ModuleType:
    """Imports a module of another library; skips the test if the library is missing."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package in _needs_torchvision:
        _declare_torchvision_operators()
    return importlib.import_module(name)


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Returns a function that builds the timm model ``name`` with ten classes."""
    return lambda: library("timm").create_model(name, num_classes=10, **options)


def _declare_torchvision_operators() -> None:
    """Declares two operators without which torchvision cannot be imported beside a CPU build of torch.

    torchvision's wheels hold operators for a CUDA build alone, which do not load beside a CPU build. Its import looks
    for the schemas of two of them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        pytest.skip("torchvision is not installed")
    try:
        torch.ops.load_library(str(next(Path(spec.origin).parent.glob("_C*"))))
    except (OSError, StopIteration):
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
