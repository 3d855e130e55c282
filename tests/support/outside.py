"""Modules of other libraries, for tests that compare ours with them; a missing library skips the test."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
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

_ULTRALYTICS = "ultralytics.nn.modules.conv"
_needs_torchvision = ("peft", "ptflops", "segmentation_models_pytorch", "timm", "torchvision", "ultralytics")


def library(name: str) -> ModuleType:
    """Imports a module of another library; skips the test if the library is missing."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package in _needs_torchvision:
        _declare_torchvision_operators()
    return importlib.import_module(name)


def ultralytics_modules() -> ModuleType:
    """Imports Ultralytics' convolution modules, or stand-ins if it is not installed.

    The stand-ins, `ultralytics_gates`, have the names, parameters and mathematics of its three gates.
    """
    if importlib.util.find_spec("ultralytics") is not None:
        return library(_ULTRALYTICS)
    if _ULTRALYTICS not in sys.modules:
        sys.modules[_ULTRALYTICS] = importlib.import_module("ultralytics_gates")
        _make_stand_ins_known()
    return sys.modules[_ULTRALYTICS]


def _make_stand_ins_known() -> None:
    """Makes the recipes for Ultralytics take the forwards of the stand-ins for the known version."""
    source_hash = importlib.import_module("visattn_fast.integrations.recipe").source_hash
    recipes = importlib.import_module("visattn_fast.integrations.ultralytics").RECIPES
    for i, recipe in enumerate(recipes):
        repeats = tuple(r._replace(known=source_hash(r.function)) for r in recipe.repeats)
        recipes[i] = dataclasses.replace(recipe, repeats=repeats)


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
