"""`explain`: which backend and ops would serve a call, and why no other would, without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .backends import CONTEXTS, Decision, backends, decide, listeners, preference
from .ops.autograd import FusedOp
from .ops.layout import memory_format
from .reference import as_built

__all__ = ["Call", "Explanation", "explain"]

_LABELS = {"export": "export, torch.func"}


@dataclass
class Call:
    """A function of the package that the explained call would call.

    Attributes:
        name: the stem of its family.
        x: its first tensor in words: device, dtype, shape and memory layout.
        decision: the backend that serves it, and why.
        asked: the choice in force: ``"auto"``, or the name given to `use_backend`.
        ops: the ops of its forward pass; empty if plain PyTorch serves.
        in_torch: those ops that have no kernel on this device: they are made of PyTorch's operations.
        against: backend -> every reason why it does not serve, for the backends that do not.
        elsewhere: the decision under ``"torch.compile"``, and in exports, traces and torch.func (``"export"``).
    """

    name: str
    x: str
    decision: Decision
    asked: str
    ops: list[str]
    in_torch: set[str]
    against: dict[str, str]
    elsewhere: dict[str, Decision]

    def __str__(self) -> str:
        ops = ", ".join(op + " (PyTorch's operations)" * (op in self.in_torch) for op in self.ops)
        served = f"op{'s' * (len(self.ops) > 1)} {ops}" if ops else "plain PyTorch"
        notes = self.against | {
            _LABELS.get(where, where): d.backend + f": {d.why}" * (d != self.decision)
            for where, d in self.elsewhere.items()
        }
        first = f"{self.name} on {self.x}: {self.decision.backend}, {served}  ({self.asked}: {self.decision.why})"
        return "\n".join([first, *(f"  {name + ':':<19} {note}" for name, note in notes.items())])


@dataclass
class Explanation:
    """The result of `explain`. Printing it shows every call.

    Attributes:
        calls: the calls, in order.
        called_layers: module -> why it calls its layers instead of replacing them, for the modules that do.
    """

    calls: list[Call]
    called_layers: dict[str, str]

    def __str__(self) -> str:
        lines = [str(call) for call in self.calls] or ["no function of visattn_fast is called"]
        return "\n".join([*lines, *(f"{name} calls its layers: {why}" for name, why in self.called_layers.items())])

    __repr__ = __str__


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Explains which backend and which ops would serve ``function(*args, **kwargs)``, and why no other backend would.

    Nothing is computed and nothing changes: parameters, buffers and arguments are replaced by tensors without values.
    `use_backend` and `torch.no_grad` count: call `explain` inside them to see their effect.

    Args:
        function: a module of the package, an accelerated model, or a function of `functional`.
        args, kwargs: its arguments, such as an example input.

    Returns:
        An `Explanation` with one `Call` for each function of the package that would be called, in order, and the
        modules that call their layers, with the reason.

    Raises:
        RuntimeError: the backend asked for cannot serve; the message lists every backend's reasons.

    Example:
        >>> print(vf.explain(vf.FastECA(256), torch.empty(8, 256, 56, 56)))
        eca on cpu, float32, [8, 256, 56, 56], nchw: cpp, op eca_fwd  (auto: the first backend that can serve)
          cuda:               serves cuda, not cpu
          ...
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # not at the top: its import takes a while

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    calls: list[Call] = []
    called_layers: dict[str, str] = {}
    names = {m: name for name, m in function.named_modules() if name} if isinstance(function, nn.Module) else {}

    def empty(t: Any) -> Any:
        return fake.from_tensor(t) if isinstance(t, Tensor) else t

    def listen(op: FusedOp, x: Tensor, decision: Decision) -> None:
        if not quiet:
            quiet.append(op)  # `_call` decides again, for other contexts
            calls.append(_call(op, x, decision))
            quiet.clear()

    def hear(module: nn.Module, reason: str) -> None:
        called_layers.setdefault(names.get(module, type(module).__name__), reason)

    quiet: list[FusedOp] = []
    args, kwargs = tree_map(empty, args), tree_map(empty, kwargs)
    listeners.append(listen)
    as_built.listeners.append(hear)
    try:
        with fake, _Ops(calls):
            if isinstance(function, nn.Module):
                state = {name: empty(t) for name, t in (*function.named_parameters(), *function.named_buffers())}
                torch.func.functional_call(function, state, args, kwargs)
            else:
                function(*args, **kwargs)
    finally:
        listeners.remove(listen)
        as_built.listeners.remove(hear)
    return Explanation(calls, called_layers)


class _Ops(TorchDispatchMode):
    """Records each op of the package in the latest call."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "visattn_fast" and self.calls:
            call, key = self.calls[-1], torch._C._dispatch_key_for_device(args[0].device.type)
            call.ops.append(func._opname)
            if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                call.in_torch.add(func._opname)
        return func(*args, **(kwargs or {}))


def _call(op: FusedOp, x: Tensor, decision: Decision) -> Call:
    dtype = str(x.dtype).removeprefix("torch.")
    layout = ""
    if x.dim() == 4:
        layout = ", channels_last" if memory_format(x) == torch.channels_last else ", nchw"
    asked = preference()
    preferred = f"can serve, but {decision.backend} {'takes precedence' if asked == 'auto' else 'is asked for'}"
    against = {}
    for name, backend in backends(x.device).items():
        if name != decision.backend:
            reasons = backend.reasons_against(x.dtype) or [backend.opt_in] * bool(backend.opt_in)
            needed = name != "reference" and decision.backend != "torch"
            against[name] = "; ".join(reasons) or (preferred if needed else "not needed")
    elsewhere = {where: decide(x, op, where) for where in CONTEXTS[1:]}
    words = f"{x.device.type}, {dtype}, {list(x.shape)}{layout}"
    return Call(op.name, words, decision, asked, [], set(), against, elsewhere)
