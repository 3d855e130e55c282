"""`explain` says which backend and ops would serve a call, and why no other would, without running it."""

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

__all__ = ["Call", "Explanation", "explain"]


@dataclass
class Call:
    """One function of the package within a call.

    Attributes:
        name: the stem of its family.
        x: its first tensor in words: device, dtype, shape and memory layout.
        decision: who serves it, and why.
        asked: the choice in force: ``"auto"``, or the name given to `use_backend`.
        ops: the package's ops that it calls in its forward pass; empty if plain PyTorch serves.
        against: backend -> every reason why it does not serve, for the backends that do not.
        elsewhere: the decision under ``"torch.compile"``, and in exports, traces and torch.func (``"export"``).
    """

    name: str
    x: str
    decision: Decision
    asked: str
    ops: list[str]
    against: dict[str, str]
    elsewhere: dict[str, Decision]

    def __str__(self) -> str:
        ops = f", op{'s' * (len(self.ops) > 1)} {', '.join(self.ops)}" if self.ops else ", plain PyTorch"
        lines = [f"{self.name} on {self.x}: {self.decision.backend}{ops}  (asked: {self.asked}; {self.decision.why})"]
        lines += [f"  {backend + ':':<14} {reasons}" for backend, reasons in self.against.items()]
        lines += [f"  {where + ':':<14} {d.backend}: {d.why}" for where, d in self.elsewhere.items()]
        return "\n".join(lines)


@dataclass
class Explanation:
    """The answer of `explain`. Printing it shows each call."""

    calls: list[Call]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "no function of visattn_fast is called"

    __repr__ = __str__


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend and which ops would serve ``function(*args, **kwargs)``, and why no other backend does.

    Nothing is computed and nothing changes: parameters, buffers and arguments are replaced by tensors without values.
    The choice in force counts, so call it under `use_backend` or `torch.no_grad` to see what these change.

    Args:
        function: a module of the package, an accelerated model, or a function of `functional`.
        args, kwargs: its arguments, such as an example input.

    Returns:
        An `Explanation` with one `Call` for each function of the package that would be called, in order.

    Raises:
        RuntimeError: the backend that was asked for cannot serve; the message lists every backend's reasons.

    Example:
        >>> print(vf.explain(vf.FastECA(256), torch.empty(8, 256, 56, 56)))
        eca on cpu, float32, [8, 256, 56, 56], nchw: cpp, op eca_fwd  (asked: auto; ...)
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # not at the top: its import takes a while

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    calls: list[Call] = []

    def empty(t: Any) -> Any:
        return fake.from_tensor(t) if isinstance(t, Tensor) else t

    def listen(op: FusedOp, x: Tensor, decision: Decision) -> None:
        if not quiet:
            quiet.append(op)  # `_call` asks again, of other surroundings
            calls.append(_call(op, x, decision))
            quiet.clear()

    quiet: list[FusedOp] = []
    args, kwargs = tree_map(empty, args), tree_map(empty, kwargs)
    listeners.append(listen)
    try:
        with fake, _Ops(calls):
            if isinstance(function, nn.Module):
                state = {name: empty(t) for name, t in (*function.named_parameters(), *function.named_buffers())}
                torch.func.functional_call(function, state, args, kwargs)
            else:
                function(*args, **kwargs)
    finally:
        listeners.remove(listen)
    return Explanation(calls)


class _Ops(TorchDispatchMode):
    """Notes each op of the package with the call that was decided last."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "visattn_fast" and self.calls:
            self.calls[-1].ops.append(func._opname)
        return func(*args, **(kwargs or {}))


def _call(op: FusedOp, x: Tensor, decision: Decision) -> Call:
    dtype = str(x.dtype).removeprefix("torch.")
    layout = ""
    if x.dim() == 4:
        layout = ", channels_last" if memory_format(x) == torch.channels_last else ", nchw"
    against = {}
    for name, backend in backends(x.device).items():
        reasons = backend.reasons_against(x.dtype) + [backend.opt_in] * bool(backend.opt_in)
        if name == "reference":
            reasons = ["not needed"]
        if name != decision.backend:
            against[name] = "; ".join(reasons) or decision.why
    elsewhere = {where: decide(x, op, where) for where in CONTEXTS[1:]}
    asked = preference()
    words = f"{x.device.type}, {dtype}, {list(x.shape)}{layout}"
    return Call(op.name, words, decision, asked, [], against, elsewhere)
