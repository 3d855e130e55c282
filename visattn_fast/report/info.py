"""``visattn-fast info``: versions, devices, and each backend: if it is available, when it is chosen, and why not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator

import torch

from ..backends import backends, select
from . import cuda_plan
from .machine import describe

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "xpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--shape", metavar="NxCxHxW", help="say which native CUDA kernel this shape takes, and why")
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="with --shape (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints everything, or the kernels that a shape takes. Returns the exit status."""
    if args.shape is None:
        print("\n".join(lines()))
        return 0
    shape = tuple(int(size) for size in args.shape.split("x") if size.isdigit())
    if len(shape) != 4 or not all(shape):
        print(f"visattn-fast info: --shape must be like 64x256x56x56, got {args.shape!r}", file=sys.stderr)
        return 2
    try:
        print("\n".join(cuda_plan.lines(shape, getattr(torch, args.dtype))))
    except RuntimeError as error:
        print(f"visattn-fast info: {error}", file=sys.stderr)
        return 1
    return 0


def lines() -> Iterator[str]:
    """Yields the lines that `info` prints."""
    machine = describe(torch.device("cpu"))
    commit = f" ({machine.commit})" if machine.commit else ""
    yield f"visattn_fast {machine.package}{commit}"
    yield f"torch        {machine.torch}"
    yield f"triton       {machine.triton or 'not installed'}"
    yield f"python       {machine.python}, {machine.system}"
    yield f"compiler     {machine.compiler or 'none found: torch.compile cannot serve the CPU'}"
    yield f"cpu          {machine.cpu}, {machine.cores} cores, {machine.threads} threads"
    for device_type in _DEVICES:
        yield ""
        yield from _device_lines(device_type)


def _device_lines(device_type: str) -> Iterator[str]:
    yield f"{device_type}: {', '.join(_names(device_type)) or 'no such device here'}"
    chosen = {dtype: select(device_type, dtype, "auto") for dtype in _DTYPES}
    choices = (f"{b} for {_listed(d for d in _DTYPES if chosen[d] == b)}" for b in dict.fromkeys(chosen.values()))
    yield f"  auto takes {'; '.join(choices)}"
    for name, backend in backends(device_type).items():
        if backend.available:
            refused = {dtype: backend.reasons_against(dtype) for dtype in _DTYPES}
            notes = [_listed(dtype for dtype in _DTYPES if not refused[dtype])]
            notes += [f"not {_listed(dtype for dtype in _DTYPES if refused[dtype])}"] * any(refused.values())
            notes += [f"auto passes it over: {backend.opt_in}"] * bool(backend.opt_in)
        else:
            notes = list(backend.missing)
        yield f"  {name:<9}  {'available' if backend.available else 'absent   '}  {'; '.join(notes)}"


def _names(device_type: str) -> list[str]:
    """Returns the names of the devices of this type."""
    if device_type == "cpu":
        return [describe(torch.device("cpu")).device_name]
    module = torch.get_device_module(device_type)
    return [module.get_device_name(index) for index in range(module.device_count())]


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
