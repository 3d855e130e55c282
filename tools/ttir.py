"""Finds faults in Triton's first intermediate code (TTIR): 32-bit addresses that overflow, NaN that is lost."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_NAME = re.compile(r"%[\w.$-]+")
_NAN = re.compile(r"dense<0x(7FC00000|7FC0|7E00|7FF8000000000000)>|constant 0x7F[CF]", re.IGNORECASE)
_LOSES_NAN = ("arith.maxnumf", "arith.minnumf")  # of a number and NaN they give the number


@dataclass(eq=False)
class Value:
    """The result of an operation; or an argument, of the kernel (op "argument") or of a loop ("counter", "carried")."""

    name: str
    op: str
    text: str
    operands: list[Value]
    uses: list[Value] = field(default_factory=list)

    @property
    def bits(self) -> int:
        """The width of its integers; 32 if the text does not tell it."""
        widths = re.findall(r"i(\d+)\b", self.text.rpartition(" : ")[2])
        return int(widths[-1]) if widths else 32

    def before(self) -> Iterator[Value]:
        """Yields itself and everything that it was computed from, back to loads from memory."""
        seen, todo = {self}, [self]
        while todo:
            value = todo.pop()
            yield value
            new = [v for v in value.operands if v not in seen] if value.op != "tt.load" else []
            seen.update(new)
            todo += new


@functools.lru_cache(maxsize=16)
def parse(text: str) -> list[Value]:
    """Returns the values of a TTIR module. Regions may reuse names, so the latest definition counts."""
    values: list[Value] = []
    latest: dict[str, Value] = {}
    reduction: Value | None = None

    def define(name: str, op: str, line: str, operands: str = "") -> Value:
        value = Value(name, op, line, [latest[n] for n in _NAME.findall(operands) if n in latest])
        for operand in value.operands:
            operand.uses.append(value)
        latest[name] = value
        values.append(value)
        return value

    for line in map(str.strip, text.splitlines()):
        if line.startswith("tt.func"):
            for name, kind in re.findall(r"(%[\w.$-]+): (\S+)", line):
                define(name, "argument", f"{name} : {kind.rstrip(',)')}")
            continue
        line = line.partition(" loc(")[0]
        if reduction:  # its combining function: only the names of the operations matter
            reduction.text += f"\n{line}"
            reduction = None if line.startswith("})") else reduction
            continue
        found = re.match(r'(?:(%[\w.$-]+)(?::\d+)? = )?"?([a-z]+\.[\w.]+)"?(.*)', line)
        if not found:
            continue
        name, op, rest = found.groups()
        value = define(name or "", op, line, rest)
        if op == "tt.reduce":
            reduction = value
        elif op == "scf.for":
            counter, bounds = re.match(r" (%[\w.$-]+) = (.*? step %[\w.$-]+)", rest).groups()
            define(counter, "counter", line.rstrip(" {"), bounds)
            for carried, start in re.findall(r"(%[\w.$-]+) = (%[\w.$-]+)", rest.partition("iter_args")[2]):
                define(carried, "carried", "", start)
    return values


def lost_nan(ttir: str) -> list[str]:
    """Finds every maximum or minimum of floats that loses NaN, unless NaN is removed before and put back after it."""
    faults = []
    for value in parse(ttir):
        if any(op in value.text for op in _LOSES_NAN):
            shielded = all(_without_nan(v) for v in value.operands[: 1 if value.op == "tt.reduce" else 2])
            if not ((shielded and any(_puts_nan_back(use) for use in value.uses)) or _is_exponentiated(value)):
                faults.append(f"{value.name} loses NaN: {next(op for op in _LOSES_NAN if op in value.text)}")
        elif value.op == "arith.select" and _is_ordered_choice(value):
            faults.append(f"{value.name} loses NaN: {value.text}")
    return faults


def _without_nan(value: Value) -> bool:
    """True if it is ``select(v != v, constant, v)``, or a constant."""
    if value.op != "arith.select":
        return value.op == "arith.constant"
    test, constant, kept = value.operands
    return (
        test.op == "arith.cmpf"
        and " une," in test.text
        and test.operands == [kept, kept]
        and not _NAN.search(constant.text)
    )


def _is_exponentiated(value: Value) -> bool:
    """True if it is the maximum along rows that a softmax subtracts: the exponentials keep what the maximum loses."""
    if value.op != "tt.reduce":
        return False
    shifted = [use for use in value.operands[0].uses if use.op == "arith.subf" and use.operands[0] is value.operands[0]]
    return any(use.op in ("math.exp", "math.exp2") for shift in shifted for use in shift.uses)


def _puts_nan_back(value: Value) -> bool:
    return value.op == "arith.select" and any(_NAN.search(v.text) for v in value.operands[1:])


def _is_ordered_choice(value: Value) -> bool:
    """True if it is ``select(a > b, a, b)``: the comparison is false for a NaN in a, which is then dropped."""
    test, chosen, other = value.operands
    ordered = test.op == "arith.cmpf" and re.search(r" o[lg][te],", test.text)
    return bool(ordered) and {chosen, other} == set(test.operands) and chosen.op != "arith.constant"


def overflows(ttir: str, arguments: Sequence[Any], grid: tuple[int, ...]) -> list[str]:
    """Finds every 32-bit operation behind an address that leaves 32 bits when launched so.

    Args:
        arguments: the kernel's arguments in order; integers count.
        grid: programs along each axis.
    """
    values = parse(ttir)
    faults: dict[Value, str] = {}
    ranges = _ranges(dict(zip((v for v in values if v.op == "argument"), arguments, strict=True)), grid)
    for access in (v for v in values if v.op == "tt.addptr"):
        tensor = next(v.name for v in access.before() if v.op == "argument" and "!tt.ptr" in v.text)
        for value in access.operands[1].before():
            if value.bits > 32 or value.op not in _MAY_OVERFLOW:
                continue
            low, high = ranges(value)
            if low < -(2**31) or high >= 2**31:
                faults[value] = f"32-bit offset into {tensor[1:]} reaches {max(high, -low):,}: {value.text}"
            elif value.op == "carried":
                faults[value] = f"32-bit offset into {tensor[1:]} is carried through a loop: {value.name}"
    return list(faults.values())


_Range = tuple[int, int]


def _ranges(scalars: dict[Value, Any], grid: tuple[int, ...]) -> Callable[[Value], _Range]:
    """Returns a function that bounds the integers of a value."""
    axes = {"x": 0, "y": 1, "z": 2}

    @functools.cache
    def of(value: Value) -> _Range:
        if value.op == "argument":
            known = scalars[value]
            return known, known
        if value.op == "arith.constant":
            number = re.search(r"constant (?:dense<)?(-?\d+)", value.text)
            return (int(number[1]), int(number[1])) if number else (0, 1)  # else true or false
        if value.op in ("tt.get_program_id", "tt.get_num_programs"):
            programs = (*grid, 1, 1)[axes[value.text.split()[3]]]
            return (0, programs - 1) if value.op == "tt.get_program_id" else (programs, programs)
        if value.op == "tt.make_range":
            bounds = dict(re.findall(r"(end|start) = (\d+)", value.text))
            return int(bounds["start"]), int(bounds["end"]) - 1
        if value.op == "counter":
            (start, _), (_, end) = map(of, value.operands[:2])
            return start, max(end - 1, start)
        if value.op in _SAME:
            return of(value.operands[0])
        if value.op in _ARITHMETIC:
            return _ARITHMETIC[value.op](*map(of, value.operands[:2]))
        if value.op == "arith.select":
            pairs = [of(v) for v in value.operands[1:]]
            return min(low for low, _ in pairs), max(high for _, high in pairs)
        return -(2 ** (value.bits - 1)), 2 ** (value.bits - 1) - 1

    return of


def _corners(combine: Callable[[int, int], int]) -> Callable[[_Range, _Range], _Range]:
    def bound(a: _Range, b: _Range) -> _Range:
        results = [combine(i, j) for i in a for j in b]
        return min(results), max(results)

    return bound


def _quotient(i: int, j: int) -> int:
    return abs(i) // abs(j) * (1 if (i < 0) == (j < 0) else -1)


def _remainder(a: _Range, b: _Range) -> _Range:
    limit = max(map(abs, b)) - 1
    if 0 <= a[0] <= a[1] <= limit:
        return a
    return max(min(a[0], 0), -limit), min(max(a[1], 0), limit)


_MAY_OVERFLOW = ("arith.addi", "arith.subi", "arith.muli", "arith.shli", "carried")
_SAME = ("arith.extsi", "arith.extui", "arith.trunci", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
_ARITHMETIC = {
    "arith.addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": _corners(lambda i, j: i * j),
    "arith.divsi": _corners(_quotient),
    "arith.divui": _corners(_quotient),
    "arith.remsi": _remainder,
    "arith.remui": _remainder,
    "arith.shli": _corners(lambda i, j: i << j),
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
}
