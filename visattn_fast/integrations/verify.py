"""Compares swapped modules with their originals on the model's own data: results, gradients, memory, time."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..backends import select
from ..measure.accuracy import DIFFERENCE, largest
from ..measure.memory import saved_bytes
from ..measure.timing import Effort, Run, interleaved, quantiles
from .outcome import Acceleration, Skipped, Swapped
from .recipe import put_back, swap

_EFFORT = Effort(seconds=0.2, fewest=7, most=100)
_NOISE = 1.03  # a module slower by less than this factor stays: it may be noise


def verify(model: nn.Module, example: Any, found: Acceleration) -> None:
    """Puts back every swapped module that differs from its original or is slower; fills in the others' figures."""
    arguments = example if isinstance(example, tuple) else (example,)
    calls = _calls(model, arguments, found.swapped)
    kept = []
    for swapped in found.swapped:
        # A block is asked again: its gate comes before it, and may have been put back.
        op, reason = swapped.recipe.plan(swapped.module)
        reason = "" if op else reason
        reason = reason or _judge(swapped, calls.get(swapped.name), model.training)
        if reason:
            put_back(swapped.module)
            found.skipped.append(Skipped(swapped.name, swapped.kind, reason))
        else:
            kept.append(swapped)
    found.swapped = kept
    x = next((a for a in arguments if isinstance(a, Tensor)), None)
    if x is not None:
        found.backend = select(x.device.type, x.dtype, "auto")


def _calls(model: nn.Module, arguments: tuple[Any, ...], swapped: list[Swapped]) -> dict[str, Any]:
    """Records the (args, kwargs) that the model gives each module, by name. Leaves the model's state as it was.

    Blocks run their original forward, which calls a gate with the arguments that its original takes.
    """
    calls: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, (args, kwargs))

        return hook

    handles = [s.module.register_forward_pre_hook(record(s.name), with_kwargs=True) for s in swapped]
    blocks = [s for s in swapped if s.recipe.block]
    for block in blocks:
        put_back(block.module)
    try:
        with _state_kept(model), torch.no_grad():
            model(*arguments)
    finally:
        for block in blocks:
            swap(block.module, block.recipe, block.name)
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Restores buffers and random generators when the context ends."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _judge(swapped: Swapped, call: Any, training: bool) -> str:
    """Returns why the module must be put back; an empty string if it may stay. Fills in its figures."""
    if call is None:
        return ""  # the example does not reach the module
    fused = copy.deepcopy(swapped.module)
    original = copy.deepcopy(swapped.module)
    put_back(original)
    differs = _difference(*(_run(m, call) for m in (copy.deepcopy(original), copy.deepcopy(fused))))
    if differs:
        warnings.warn(f"{swapped.name} ({swapped.kind}) is put back: its fused forward {differs}", stacklevel=4)
        return differs
    pair = {"original": original, "fused": fused}
    before, after = (saved_bytes(functools.partial(_run, m, call), m.parameters()) for m in pair.values())
    swapped.saved_bytes = before - after
    timed = _run if training else _forward
    runs: dict[str, Run] = {name: functools.partial(timed, m, call) for name, m in pair.items()}
    device = next((a.device for a in tree_leaves(call) if isinstance(a, Tensor)), torch.device("cpu"))
    seconds = interleaved(runs, device, _EFFORT)
    original_s, fused_s = (quantiles(seconds[name])[1] for name in pair)
    swapped.speedup = original_s / fused_s
    return f"slower on this device: {swapped.speedup:.2f} x" if fused_s > original_s * _NOISE else ""


def _run(module: nn.Module, call: Any) -> dict[str, Tensor]:
    """Returns y and the gradients of the inputs and of every parameter, each under its name in words."""
    args, kwargs = tree_map(_leaf, call)
    inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        y = module(*args, **kwargs)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        grads = torch.autograd.grad(y, [*inputs, *parameters.values()], grad, allow_unused=True)
    names = [*(f"input {i}" for i in range(len(inputs))), *parameters]
    return {
        "its result": y.detach(),
        **{f"the gradient of {n}": g for n, g in zip(names, grads, strict=True) if g is not None},
    }


@torch.no_grad()
def _forward(module: nn.Module, call: Any) -> Tensor:
    args, kwargs = call
    return module(*args, **kwargs)


def _leaf(a: Any) -> Any:
    return a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a


def _difference(original: dict[str, Tensor], fused: dict[str, Tensor]) -> str:
    """Says in words which tensor differs by more than `DIFFERENCE` allows; returns an empty string if none does."""
    if original.keys() != fused.keys():
        return f"gives {sorted(fused)}, not {sorted(original)}"
    for name, want in original.items():
        got = fused[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"gives {name} as {tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}"
        if not torch.equal(got.isfinite(), want.isfinite()):
            return f"differs in {name}: other elements are not finite"
        got, want = (torch.where(t.isfinite(), t, 0).double() for t in (got, want))
        allowed = DIFFERENCE[original[name].dtype] * largest(want)
        error = largest(got - want)
        if error > allowed:
            return f"differs in {name}: by {error:.2g}, where rounding explains {allowed:.2g}"
    return ""
