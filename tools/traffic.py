"""Counts the bytes that each op's Triton launcher moves: `TRITON_INTERPRET=1 python -m tools.traffic`.

It counts the elements that each load and store of each program touches. Masked lanes do not count, and lanes of one
access with the same address count once. Work that a launcher leaves to PyTorch, such as a copy, counts too. Tensors
with a quarter of x's elements or more are held against the catalogue, in multiples of the bytes of x; the others are
small.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from visattn_fast import catalogue

from .launches import EPILOGUES, Call, Launch, launches_something
from .table import show
from .teams import together

TOLERANCE = 0.03
SHAPE = (2, 40, 16, 20)  # several programs along each axis, the last one masked; about 2 ms a program
CUBE = (1, 64, 56, 48)  # large enough for the faces of triplet attention to be small

# The methods of the interpreter's builder that touch memory; its other loads and stores call these.
_ACCESSES = {
    "create_masked_load": ("read",),
    "create_masked_store": ("write",),
    "create_atomic_rmw": ("read", "write"),
    "create_atomic_cas": ("read", "write"),
}


@dataclass(frozen=True)
class Moved:
    """The bytes that one launch reads from, or writes to, one tensor."""

    op: str
    launch: int
    kernel: str
    tensor: str
    kind: str  # "read" or "write"
    elements: int  # of the tensor
    bytes: int


@dataclass
class Traffic:
    """Everything that was moved; as an observer of launches, it runs and counts them."""

    moved: list[Moved] = field(default_factory=list)
    launches: int = 0
    running: bool = False

    def __call__(self, launch: Launch, run: Callable[[], None]) -> None:
        tensors = {name: t for name, t in launch.tensors.items() if t.numel()}
        self.launches += 1
        self.running = True
        try:
            with _counting(tensors) as count:
                run()
        finally:
            self.running = False
        for (name, kind), moved in count.items():
            self._add(launch.op, launch.name, name, kind, tensors[name].numel(), moved)

    def operation(self, op: str, func: Any, inputs: Any, outputs: Any) -> None:
        """Counts an operation of PyTorch inside a launcher, unless it only makes a view or allocates."""
        if self.running or not launches_something(func, inputs, outputs):
            return
        self.launches += 1
        for kind, values in (("read", inputs), ("write", outputs)):
            for i, t in enumerate(v for v in tree_leaves(values) if isinstance(v, torch.Tensor)):
                self._add(op, str(func), f"{'input' if kind == 'read' else 'result'} {i}", kind, t.numel(), t.nbytes)

    def _add(self, op: str, kernel: str, tensor: str, kind: str, elements: int, count: int) -> None:
        self.moved.append(Moved(op, self.launches, kernel, tensor, kind, elements, count))


@dataclass(frozen=True)
class Account:
    """The traffic of one op on one x, beside what it declares; figures are multiples of the bytes of x."""

    op: str
    declared: float
    moved: tuple[Moved, ...]
    x: torch.Tensor
    rereads: bool = False  # a tensor counts once a launch, because it is read again from a cache

    @property
    def streamed(self) -> float:
        """All traffic of tensors that are about as large as x."""
        return sum(self._bytes(m) for m in self.moved if self._large(m)) / self.x.nbytes

    @property
    def small(self) -> float:
        """All other traffic; most of it stays in a GPU's caches."""
        return sum(m.bytes for m in self.moved if not self._large(m)) / self.x.nbytes

    @property
    def verdict(self) -> str:
        if self.streamed > self.declared * (1 + TOLERANCE):
            return "too much"
        return "less: tighten the catalogue" if self.streamed < self.declared * (1 - TOLERANCE) else "as declared"

    @property
    def fault(self) -> str:
        """The accesses that move too much, the largest first; empty if nothing does."""
        if self.verdict != "too much":
            return ""
        large = sorted((m for m in self.moved if self._large(m)), key=lambda m: -m.bytes)
        parts = [f"{m.kernel} (launch {m.launch}) {m.kind}s {m.tensor} {m.bytes / self.x.nbytes:.2f} N" for m in large]
        return f"{self.op} moves {self.streamed:.2f} N, {self.declared:g} N are declared: {'; '.join(parts)}"

    def _bytes(self, m: Moved) -> int:
        return min(m.bytes, m.elements * self.x.element_size()) if self.rereads else m.bytes

    def _large(self, m: Moved) -> bool:
        return m.elements * 4 >= self.x.numel()


def accounts(call: Call) -> list[Account]:
    """Runs the call under the interpreter, and returns the account of each of its directions."""
    traffic = Traffic()
    with together():
        call.run("cpu", traffic, traffic.operation)
    x = torch.empty(call.shape, dtype=call.dtype, device="meta")
    return [
        Account(op, passes, tuple(m for m in traffic.moved if m.op == op), x, call.entry.rereads)
        for op, passes in call.passes().items()
    ]


def calls(entry: catalogue.Entry) -> Iterable[Call]:
    """Yields calls in both layouts, with each epilogue, and of a slice, which must not be copied.

    There are none if the module does not support the shape.
    """
    shape = CUBE if "triplet_pool" in entry.ops else SHAPE
    if not entry.supports(shape):
        return
    if entry.rereads:  # its ops see tokens, whatever x's layout
        yield Call(entry, shape)
        return
    for layout in catalogue.LAYOUTS:
        for resident in (False, True) if entry.resident else (False,):
            for residual, activation in EPILOGUES if entry.epilogue else EPILOGUES[:1]:
                yield Call(entry, shape, layout, residual=residual, activation=activation, resident=resident)
            yield Call(entry, shape, layout, sliced=True, resident=resident)


@contextmanager
def _counting(tensors: dict[str, torch.Tensor]) -> Iterator[dict[tuple[str, str], int]]:
    """Within the context, counts bytes by tensor and kind; a tensor is known by its range of addresses.

    Two names of the same memory count once, under the first.
    """
    count: dict[tuple[str, str], int] = {}
    starts = {name: start for start, name in {t.data_ptr(): name for name, t in reversed(tensors.items())}.items()}
    ends = {
        name: start + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        for name, start in starts.items()
        for t in [tensors[name]]
    }

    def add(pointers: Any, mask: Any, kinds: tuple[str, ...]) -> None:
        lanes = np.asarray(mask.data, bool) if mask is not None else slice(None)
        addresses = np.unique(pointers.data[lanes])
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        for name, start in starts.items():
            inside = size * int(((addresses >= start) & (addresses < ends[name])).sum())
            for kind in kinds if inside else ():
                count[name, kind] = count.get((name, kind), 0) + inside

    with ExitStack() as stack:
        for method, kinds in _ACCESSES.items():
            original = getattr(interpreter.InterpreterBuilder, method)
            counted = _counted(original, lambda pointers, mask, kinds=kinds: add(pointers, mask, kinds))
            stack.enter_context(mock.patch.object(interpreter.InterpreterBuilder, method, counted))
        yield count


def _counted(method: Callable[..., Any], add: Callable[[Any, Any], None]) -> Callable[..., Any]:
    names = list(inspect.signature(method).parameters)

    def counting(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        add(given["ptrs" if "ptrs" in given else "ptr"], given.get("mask"))
        return method(*args)

    return counting


def main() -> int:
    rows, faults = [], []
    for entry in (*catalogue.ENTRIES.values(), *catalogue.INFERENCE.values()):
        for call in calls(entry):
            for a in accounts(call):
                figures = (f"{a.declared:g}", f"{a.streamed:.3f}", f"{a.small:.3f}")
                kind = ", sliced" * call.sliced + ", resident" * call.resident
                rows.append((a.op, call.layout + kind, call.epilogue, *figures, a.verdict))
                faults += [a.fault] if a.fault else []
    show("Traffic in multiples of x", ("op", "layout", "epilogue", "declared", "moved", "small", ""), rows)
    print(*faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
