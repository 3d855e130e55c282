"""Runs of a model that leave no trace: its state, and the random generators, are then as they were before."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Restores every attribute of every module when the context ends: buffers, modes, hooks, counters, caches.

    Lists, dicts and sets among the attributes get their elements back, not copies of these. Modules update copies of
    their buffers.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = [(m.__dict__, m.__dict__.copy()) for m in modules]
    values = [value for _, before in attributes for value in before.values()]
    containers = [(c, _elements(c)) for c in values if isinstance(c, (dict, list, set))]
    try:
        with buffers_kept(model):
            yield
    finally:
        for now, before in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
        for container, elements in containers:
            _restore(container, elements)


def _elements(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _restore(container: Any, elements: list[Any]) -> None:
    """Gives a container its elements back, unless it has them."""
    now = _elements(container)
    pairs = isinstance(container, dict)
    if len(now) == len(elements) and all(
        (a[0] is b[0] and a[1] is b[1]) if pairs else a is b for a, b in zip(now, elements, strict=True)
    ):
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(elements)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Lets modules update copies of their buffers, such as running statistics. Scripted buffers are written back."""
    kept = [(m, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    scripted = [
        (buffer, buffer.clone())
        for m in model.modules()
        if isinstance(m, torch.jit.ScriptModule)
        for buffer in m.buffers(recurse=False)
    ]
    copies = {id(b): b.detach().clone() for _, buffers in kept for b in buffers.values() if b is not None}
    try:
        for m, buffers in kept:
            m._buffers.update({name: None if b is None else copies[id(b)] for name, b in buffers.items()})
        yield
    finally:
        for m, buffers in kept:
            m._buffers.update(buffers)
        with torch.no_grad():
            for buffer, before in scripted:
                buffer.copy_(before)


def same_randomness(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Restores the random generators of the CPU and of the tensors' devices on exit."""
    devices = _accelerators(tensors)
    return torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")


def seed(number: int, tensors: Iterable[Tensor]) -> None:
    """Seeds the random generators that `same_randomness` restores. `torch.manual_seed` would seed all devices."""
    torch.default_generator.manual_seed(number)
    for device in _accelerators(tensors):
        torch.get_device_module(device).default_generators[device.index].manual_seed(number)


def _accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    return [device for device in {t.device for t in tensors} if device.type in ("cuda", "xpu")]


def eager() -> AbstractContextManager[object]:
    """Makes compiled modules run eagerly, with their hooks. Does nothing unless Dynamo is imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
