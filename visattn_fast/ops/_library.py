"""The operator library: how an op is declared, and who owns which dispatch key.

Every op is declared with its schema, its implementation in plain PyTorch (``CompositeExplicitAutograd``, so that it
runs everywhere) and its fake. The kernels register themselves over it when a device is first used: the native library
under ``CPU`` as it is loaded, the Triton launchers through `register_triton`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ._autograd import without_autocast

LIBRARY = torch.library.Library("visattn_fast", "DEF")


class Op(NamedTuple):
    """A declared op: its implementation in plain PyTorch, and the kernels' module with the launcher of its name."""

    reference: Callable[..., Any]
    launcher: str | None


OPS: dict[str, Op] = {}


def define(schema: str, launcher: str | None, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Declares an op and returns its overload.

    Args:
        schema: ``name(arguments) -> results``.
        launcher: the module of ``visattn_fast.kernels`` whose function ``name`` is the Triton implementation.
            None: PyTorch's own operations serve every device.
        reference: the implementation in plain PyTorch.
        fake: shapes, dtypes and strides of the results.
    """
    name = schema[: schema.index("(")]
    # Kernels read any strides. Else Inductor would copy maps back to the layout that they have in eager mode.
    LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    LIBRARY.impl(name, without_autocast(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"visattn_fast::{name}", fake, lib=LIBRARY)
    OPS[name] = Op(reference, launcher)
    return getattr(torch.ops.visattn_fast, name).default


def register_triton(dispatch_key: str) -> None:
    """Gives ``dispatch_key`` of every op to its Triton launcher. Raises ImportError without triton."""
    for name, op in OPS.items():
        if op.launcher is None:
            continue
        launchers = importlib.import_module(f"visattn_fast.kernels.{op.launcher}")
        LIBRARY.impl(name, getattr(launchers, name), dispatch_key)
