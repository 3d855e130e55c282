"""Compares swapped modules with their originals on the model's own data: results, gradients, memory, time."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from ..backends import select
from ..measure.accuracy import DIFFERENCE, UNITS, largest
from ..measure.memory import saved_bytes
from ..measure.timing import Effort, Run, interleaved, quantiles
from .outcome import Acceleration, Skipped, Swapped
from .recipe import put_back, swap
from .traceless import eager, same_randomness, seed, state_kept

_EFFORT = Effort(seconds=0.2, fewest=7, most=100)
_NOISE = 1.03  # a module slower by less than this factor stays: it may be noise
_COMPARED = (int, float, str, TreeSpec)  # parts of results that are no tensors
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def verify(model: nn.Module, example: Any, found: Acceleration) -> None:
    """Puts back every swapped module that differs from its original or is slower; fills in the others' figures.

    The model runs once, in its original form, with the hooks of its owner. All other runs are of copies whose hooks do
    nothing. Random generators stay as they are.

    Raises:
        RuntimeError: a module cannot be compared.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    tensors = _tensors(arguments)
    with same_randomness((*tensors, *model.parameters(), *model.buffers())):
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
    if tensors:
        found.backend = select(tensors[0].device.type, tensors[0].dtype, "auto")


def _calls(model: nn.Module, arguments: tuple[Any, ...], swapped: list[Swapped]) -> dict[str, Any]:
    """Records the (args, kwargs) that the original model gives each swapped module, by name."""
    calls: dict[str, Any] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, (args, kwargs))

        return hook

    for s in swapped:
        put_back(s.module)
    try:
        with state_kept(model), eager(), torch.no_grad():  # takes off the hooks, too
            for s in swapped:
                s.module.register_forward_pre_hook(record(s.name), with_kwargs=True)
            model(*arguments)
    finally:
        for s in swapped:
            swap(s.module, s.recipe, s.name)
    return calls


def _judge(swapped: Swapped, call: Any, training: bool) -> str:
    """Returns why the module must be put back; an empty string if it may stay. Fills in its figures."""
    if call is None:
        return ""  # the example does not reach the module
    name = f"{swapped.name or 'model'} ({swapped.kind})"
    try:
        if any(t.is_meta for t in (*_tensors(call), *swapped.module.parameters())):
            raise ValueError("the meta device holds no values; leave the example out")
        pair = _twins(swapped.module)
        differs = _disagreement(pair["original"], pair["fused"], call)
        if not differs:
            before, after = (saved_bytes(functools.partial(_run, m, call), m.parameters()) for m in pair.values())
            swapped.saved_bytes = before - after
            runs: dict[str, Run] = {key: functools.partial(_run, m, call, training) for key, m in pair.items()}
            device = next((a.device for a in _tensors(call)), torch.device("cpu"))
            seconds = interleaved(runs, device, _EFFORT)
    except Exception as error:  # of the model's own code, or out of memory
        reason = str(error) or type(error).__name__
        raise RuntimeError(f"{name} cannot be compared with its original: {reason}") from error
    if differs:
        warnings.warn(f"{name} is put back: its fused forward {differs}", stacklevel=4)
        return differs
    original_s, fused_s = (quantiles(seconds[key])[1] for key in pair)
    swapped.speedup = original_s / fused_s
    return f"slower on this device: {swapped.speedup:.2f} x" if fused_s > original_s * _NOISE else ""


def _twins(module: nn.Module) -> dict[str, nn.Module]:
    """Returns copies of a swapped module, as its original and as it is. Their hooks are there, but do nothing."""
    fused, original = bare_copy(module), bare_copy(module)
    put_back(original)
    return {"original": original, "fused": fused}


class _Silent:
    """Takes the place of a hook: a module with hooks calls its layers."""

    def __init__(self, hook: Any) -> None:
        self.observes_input = getattr(hook, "observes_input", False)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def bare_copy(module: nn.Module) -> nn.Module:
    """Copies a module, also one that holds computed tensors. In the copy, hooks do nothing."""
    copied: dict[int, Any] = {}
    for m in module.modules():
        for hooks in (m.__dict__[name] for name in _HOOKS):
            copied[id(hooks)] = OrderedDict((key, _Silent(hook)) for key, hook in hooks.items())
        for value in (*m.__dict__.values(), *m._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:  # deepcopy refuses these
                copied[id(value)] = value.detach().clone()
    return copy.deepcopy(module, copied)


def _disagreement(original: nn.Module, fused: nn.Module, call: Any) -> str:
    """Says in words how the modules differ, with gradients as they are and without in eval mode; empty if nowhere.

    Modules with random parts draw the same numbers. If these may fall on other elements, gradients are compared in eval
    mode instead.
    """
    passes = [(False, True), (True, False)]  # in eval mode; with gradients
    for evaluated, gradients in passes:
        want = _seeded(original, call, 0, evaluated, gradients)
        differs = _difference(want, _seeded(fused, call, 0, evaluated, gradients))
        if differs and not _difference(want, _seeded(original, call, 1, evaluated, gradients)):
            return differs
        if differs and not evaluated:
            passes.append((True, True))
    return ""


def _seeded(module: nn.Module, call: Any, number: int, evaluated: bool, gradients: bool) -> dict[str, Any]:
    """Runs a copy of the module. Returns what `_run` does, and the buffers after it."""
    module = copy.deepcopy(module)
    if evaluated:
        module.eval()
    seed(number, (*module.parameters(), *_tensors(call)))
    found = _run(module, call, gradients)
    return found | {f"the buffer {name}": buffer for name, buffer in module.named_buffers()}


def _run(module: nn.Module, call: Any, gradients: bool = True) -> dict[str, Any]:
    """Returns the result and, on request, the gradients of inputs and parameters, each under its name in words."""
    if not gradients:
        with torch.no_grad():
            args, kwargs = call
            return _named_results(module(*args, **kwargs))
    args, kwargs = tree_map(_leaf, call)
    inputs = [a for a in _tensors((args, kwargs)) if a.requires_grad]
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        found = _named_results(module(*args, **kwargs))
        outputs = [y for y in found.values() if isinstance(y, Tensor) and y.requires_grad]
        wanted, random = [*inputs, *parameters.values()], torch.Generator().manual_seed(0)
        grads = [torch.randn(y.shape, generator=random).to(y) for y in outputs]
        gradient = torch.autograd.grad(outputs, wanted, grads, allow_unused=True) if outputs and wanted else ()
    found = {name: y.detach() if isinstance(y, Tensor) else y for name, y in found.items()}
    names = [*(f"input {i}" for i in range(len(inputs))), *parameters]
    return found | {f"the gradient of {n}": g for n, g in zip(names, gradient, strict=False) if g is not None}


def _named_results(y: Any) -> dict[str, Any]:
    """Returns the tensors of a result, which may be nested, and everything else in it, each under its name in words."""
    if isinstance(y, Tensor):
        return {"its result": y}
    leaves, form = tree_flatten(y)
    return {"the form of its result": form, **{f"its result {i}": leaf for i, leaf in enumerate(leaves)}}


def _tensors(nested: Any) -> list[Tensor]:
    return [a for a in tree_leaves(nested) if isinstance(a, Tensor)]


def _leaf(a: Any) -> Any:
    return a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a


def _difference(original: dict[str, Any], fused: dict[str, Any]) -> str:
    """Says in words which value differs by more than `DIFFERENCE` allows; returns an empty string if none does.

    A tensor whose terms cancel, as the gradient of a bias before a batch norm, holds rounding of the run's largest.
    """
    everything = (largest(t) for t in original.values() if isinstance(t, Tensor) and t.is_floating_point())
    terms = max(filter(math.isfinite, everything), default=0.0)
    if original.keys() != fused.keys():
        return f"gives {sorted(fused)}, not {sorted(original)}"
    for name, want in original.items():
        got = fused[name]
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            if type(got) is not type(want) or (isinstance(want, _COMPARED) and got != want):
                return f"gives {name} as {got}, not {want}"
            continue
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"gives {name} as {tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}"
        if not torch.equal(got.isfinite(), want.isfinite()):
            return f"differs in {name}: other elements are not finite"
        got, want = (torch.where(t.isfinite(), t, 0).double() for t in (got, want))
        allowed = 0.0
        if original[name].is_floating_point():
            dtype = original[name].dtype
            allowed = max(DIFFERENCE[dtype] * largest(want), UNITS * torch.finfo(dtype).eps * terms)
        error = largest(got - want)
        if error > allowed:
            return f"differs in {name}: by {error:.2g}, where rounding explains {allowed:.2g}"
    return ""
