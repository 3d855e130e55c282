"""The arguments of an op: which shapes, dtypes, layouts and ranges its kernels may count on, and the check of them.

A declaration names the arguments in the order in which they are checked. The first tensor leads: the others are on its
device, and its dtype gives the accumulation dtype. A text says what an argument must be:

- ``"N C H W : floating strided"``: a tensor's sizes, its dtype, its layout. Letters stand for sizes. The first argument
  with a letter gives it its size; later ones must agree. A size may also be a sum or product of letters, arguments and
  numbers, such as ``2*k+1``; at most one letter in it may be new. ``*`` stands for any number of sizes.
- dtypes: ``floating`` (any real floating-point dtype; sizes of 1 may follow, as in a 1x1 convolution's weight),
  ``sums`` (float32 or float64), the name of an argument, or a dtype of torch. Without one: the accumulation dtype.
- layouts: ``strided`` (any strides); ``rows`` (any strides but the last, which is 1); ``lines of x`` (dense along the
  last dimension, or along the one before it if x is in channels_last). Without one: dense. Tensors of other layouts are
  copied, so that no kernel sees their strides.
- ``"N C : int32 in 0..H*W-1"``: indices. They are compared with the range where kernels address memory by them.
- ``"M : floating with mean"``: an optional tensor that is given if and only if ``mean`` is.
- ``"like x"``: the sizes and the dtype of x, any strides.
- ``"0..2"``, ``"1.."``: the range of a number, or of a letter. Without a range, a float must still be finite.
- ``"A | B"``: the values that a letter may have.

Every size is at least 1, but for N and what ``*`` stands for: a batch may be empty, a map may not.

`check` holds a call to the declaration in Python: in front of plain PyTorch, of Triton's launchers, and in the fakes.
The native library gets the declaration as a table of numbers (`Signature.table`) and holds every call to it in C++
(csrc/common/signature.h). Both raise RuntimeError with the argument, what it must be, and what it is.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import accumulation_dtype, memory_format

# Codes of the table. csrc/common/signature.cpp has the same.
TENSOR, NUMBER = 0, 1
FLOATING, SUMS, ACCUMULATION, OF_ARGUMENT, INT32, BOOL = range(6)
STRIDED, DENSE, LINES, ROWS = range(4)
CONSTANT, VARIABLE, ADD, SUBTRACT, MULTIPLY, DIVIDE = range(6)

MAP = "N C H W : floating strided"

_DTYPES = {"floating": FLOATING, "sums": SUMS, "int32": INT32, "bool": BOOL}
_FIXED = {INT32: torch.int32, BOOL: torch.bool}
_OPERATORS: dict[type, int] = {ast.Add: ADD, ast.Sub: SUBTRACT, ast.Mult: MULTIPLY, ast.FloorDiv: DIVIDE}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEMBERED = 256  # calls of each op whose arguments are known to fit


@functools.cache
def expression(text: str) -> Expression:
    """Reads an expression once for all ops."""
    return Expression(text)


class Expression:
    """A sum or product of sizes, as text, as Python code and as a program for a machine with a stack."""

    def __init__(self, text: str) -> None:
        self.text = text
        tree = ast.parse(text, mode="eval")
        self.names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        self.code = compile(tree, text, "eval")
        self._tree = tree.body

    def value(self, sizes: Mapping[str, Any]) -> Any:
        return eval(self.code, {"__builtins__": {}}, dict(sizes))

    def program(self, variables: Sequence[str]) -> list[int]:
        """Returns the length of the program, then its steps: an operation and its operand each."""
        steps = list(self._steps(self._tree, variables))
        return [len(steps), *(number for step in steps for number in step)]

    def _steps(self, node: ast.expr, variables: Sequence[str]) -> Any:
        if isinstance(node, ast.Constant):
            yield CONSTANT, int(node.value)  # type: ignore[arg-type]
        elif isinstance(node, ast.Name):
            yield VARIABLE, variables.index(node.id)
        elif isinstance(node, ast.BinOp):
            yield from self._steps(node.left, variables)
            yield from self._steps(node.right, variables)
            yield _OPERATORS[type(node.op)], 0
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield CONSTANT, 0
            yield from self._steps(node.operand, variables)
            yield SUBTRACT, 0
        else:
            raise ValueError(f"{self.text!r} is no sum or product of sizes")


@dataclass
class Size:
    """One size of a tensor: an expression, and the letter that this size defines, or an empty string."""

    expression: Expression
    defines: str = ""

    @property
    def least(self) -> int:
        return 0 if self.expression.text == "N" else 1

    def solve(self, size: Any, sizes: Mapping[str, Any]) -> Any:
        """Returns the value of the new letter, of which the expression is a linear function; None: none fits."""
        if self.expression.text == self.defines:
            return size
        at = [self.expression.value({**sizes, self.defines: value}) for value in (0, 1)]
        step = at[1] - at[0]
        return None if size < at[0] or (size - at[0]) % step else (size - at[0]) // step


@dataclass
class TensorArgument:
    """A tensor and its declaration."""

    name: str
    position: int
    optional: bool
    text: str
    sizes: list[Size]
    ellipsis: bool  # sizes of any number come before `sizes`
    dtype: int
    dtype_of: str
    layout: int
    lines_of: str
    partner: str  # given if and only if this argument is
    low: Expression | None
    high: Expression | None

    @property
    def extends(self) -> bool:
        """True if sizes of 1 may follow."""
        return self.dtype == FLOATING and self.layout == DENSE

    def dtypes(self, given: Mapping[str, Any], leading: Tensor) -> tuple[torch.dtype, ...]:
        if self.dtype == FLOATING:
            return _FLOATS
        if self.dtype == SUMS:
            return torch.float32, torch.float64
        if self.dtype == ACCUMULATION:
            return (accumulation_dtype(leading),)
        return (given[self.dtype_of].dtype if self.dtype == OF_ARGUMENT else _FIXED[self.dtype],)


@dataclass
class NumberArgument:
    """The range of a number or of a letter. ``position`` is -1 for a letter."""

    name: str
    position: int
    integer: bool
    text: str
    low: Expression | None
    high: Expression | None
    values: list[Expression]


class Signature:
    """The declared arguments of an op.

    Args:
        schema: ``name(arguments) -> results``.
        arguments: name -> text, in the order of the checks. It names every tensor of the schema.
    """

    def __init__(self, schema: str, arguments: Mapping[str, str]) -> None:
        self.name, _, rest = schema.partition("(")
        listed = [argument.split() for argument in rest.partition(")")[0].split(", ")]
        self.names = [name for _, name in listed]
        types = {name: kind for kind, name in listed}
        declared = {"activation": "0..2", **arguments} if "activation" in types else dict(arguments)
        declared = {name: declared[name] for name in sorted(declared, key=lambda n: n == "activation")}
        declared |= {name: ".." for name, kind in types.items() if kind == "float" and name not in declared}
        missing = [name for name, kind in types.items() if kind.startswith("Tensor") and name not in declared]
        if missing:
            raise ValueError(f"{self.name}: arguments must declare {', '.join(missing)}")
        self.leading = next(name for name in declared if types.get(name, "").startswith("Tensor"))
        self.variables: list[str] = []
        self.arguments: list[TensorArgument | NumberArgument] = []
        self.texts = declared
        for name, text in declared.items():
            kind = types.get(name, "")
            position = self.names.index(name) if kind else -1
            if kind.startswith("Tensor"):
                self.arguments.append(self._tensor(name, position, kind.endswith("?"), text))
            else:
                self.arguments.append(self._number(name, position, kind != "float", text))
        self._has_indices = any(isinstance(a, TensorArgument) and a.high is not None for a in self.arguments)
        self._fitting: set[Any] = set()

    def _tensor(self, name: str, position: int, optional: bool, text: str) -> TensorArgument:
        if text.startswith("like "):
            other = text.removeprefix("like ")
            text = f"{self.texts[other].partition(' : ')[0]} : {other} strided"
        text, _, bounds = text.partition(" in ")
        text, _, partner = text.partition(" with ")
        shape, _, rest = text.partition(" : ")
        words = rest.split()
        layout, lines_of = DENSE, ""
        if words and words[-1] in ("strided", "rows"):
            layout = STRIDED if words.pop() == "strided" else ROWS
        elif "lines" in words:
            layout, lines_of = LINES, words[-1]
            del words[-3:]
        dtype = _DTYPES.get(words[0], OF_ARGUMENT) if words else ACCUMULATION
        texts = shape.split()
        ellipsis = texts[0] == "*"
        sizes = [self._size(part) for part in texts[ellipsis:]]
        low, _, high = bounds.partition("..")
        return TensorArgument(
            name,
            position,
            optional,
            shape,
            sizes,
            ellipsis,
            dtype,
            words[0] if dtype == OF_ARGUMENT else "",
            layout,
            lines_of,
            partner,
            expression(low) if low else None,
            expression(high) if high else None,
        )

    def _size(self, text: str) -> Size:
        found = expression(text)
        new = [name for name in found.names if name not in self.variables]
        if len(set(new)) > 1:
            raise ValueError(f"{self.name}: the size {text} has new letters {new}")
        self.variables += new[:1]
        return Size(found, new[0] if new else "")

    def _number(self, name: str, position: int, integer: bool, text: str) -> NumberArgument:
        low, dots, high = text.partition("..")
        values = [] if dots else [expression(value.strip()) for value in text.split("|")]
        least, most = (expression(bound) if dots and bound else None for bound in (low, high))
        if position >= 0 and integer:
            self.variables.append(name)
        return NumberArgument(name, position, integer, text, least, most, values)

    def check(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Checks a call.

        Returns:
            The arguments, those of another layout than declared copied to it, and the size of each letter.

        Raises:
            RuntimeError: an argument that does not fit.
        """
        given = dict(zip(self.names, args, strict=True))
        leading = given[self.leading]
        sizes: dict[str, Any] = {}
        for argument in self.arguments:
            value = given[argument.name] if argument.position >= 0 else sizes.get(argument.name)
            partner = argument.partner if isinstance(argument, TensorArgument) else ""
            if partner and (value is None) != (given[partner] is None):
                raise RuntimeError(f"{self.name}: {argument.name} must be given if and only if {partner} is")
            if value is None:
                continue  # an absent tensor, or a letter that it would have given a size
            if isinstance(argument, NumberArgument):
                self._check_number(argument, value, sizes)
            else:
                given[argument.name] = self._check_tensor(argument, value, given, leading, sizes)
        return tuple(given.values()), sizes

    def fit(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the arguments as `check` does. A call like an earlier one costs a look-up."""
        key = tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a for a in args])
        try:
            if key in self._fitting:
                return args
        except TypeError:  # a size that torch.compile has not fixed
            return self.check(args)[0]
        fitting = self.check(args)[0]
        # Their values are part of the check, on CPUs.
        indices = args[self.names.index(self.leading)].is_cpu and self._has_indices
        if all(a is b for a, b in zip(args, fitting, strict=True)) and not indices and len(self._fitting) < _REMEMBERED:
            self._fitting.add(key)
        return fitting

    def table(self) -> tuple[str, list[int]]:
        """Returns the declaration for the native library: its texts in lines, and its numbers.

        The numbers: position of the leading tensor, number of arguments, then of each argument its kind and position;
        of a tensor dtype, the argument with this dtype, layout, the argument for lines, the argument with which it is
        given, whether sizes of 1 may follow, whether any may come before, and its sizes (least, defined letter,
        program); of a number its letter and whether it is an integer; at last the programs of the lower bound, the
        upper bound and the values, each with their number.
        """
        lines, numbers = [self.name, " ".join(self.variables)], [self.names.index(self.leading), len(self.arguments)]
        for a in self.arguments:
            lines += [a.name, ", ".join(a.text.split()) if isinstance(a, TensorArgument) else a.text]
            if isinstance(a, TensorArgument):
                others = [self.names.index(n) if n else -1 for n in (a.dtype_of, a.lines_of, a.partner)]
                numbers += [
                    TENSOR,
                    a.position,
                    a.dtype,
                    others[0],
                    a.layout,
                    others[1],
                    others[2],
                    a.extends,
                    a.ellipsis,
                ]
                numbers.append(len(a.sizes))
                for size in a.sizes:
                    defined = self.variables.index(size.defines) if size.defines else -1
                    numbers += [size.least, defined, *size.expression.program(self.variables)]
            else:
                letter = self.variables.index(a.name) if a.name in self.variables else -1
                numbers += [NUMBER, a.position, letter, a.integer]
            for bound in (a.low, a.high):
                numbers += [0] if bound is None else [1, *bound.program(self.variables)]
            values = a.values if isinstance(a, NumberArgument) else []
            numbers += [len(values), *(n for value in values for n in value.program(self.variables))]
        return "\n".join(lines), [int(n) for n in numbers]

    def _check_tensor(
        self, argument: TensorArgument, t: Tensor, given: Mapping[str, Any], leading: Tensor, sizes: dict[str, Any]
    ) -> Tensor:
        dtypes = argument.dtypes(given, leading)
        if t.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            wanted = "a floating-point dtype" if argument.dtype == FLOATING else f"the dtype {names}"
            self._fail(argument, wanted, str(t.dtype).removeprefix("torch."))
        if t.device != leading.device:
            self._fail(argument, f"the device of {self.leading}, {leading.device}", t.device)
        self._check_shape(argument, t.shape, sizes)
        if argument.high is not None and argument.low is not None and t.is_cpu and t.numel() and not _is_fake(t):
            low, high = argument.low.value(sizes), argument.high.value(sizes)
            if int(t.min()) < low or int(t.max()) > high:
                self._fail(argument, f"values in {low}..{high}", f"{int(t.min())}..{int(t.max())}")
        if argument.layout == LINES:
            return _as_lines(t, given[argument.lines_of])
        if argument.layout == ROWS:
            return t if t.stride(-1) == 1 else t.contiguous()
        return t if argument.layout == STRIDED or t.is_contiguous() else t.contiguous()

    def _check_shape(self, argument: TensorArgument, shape: torch.Size, sizes: dict[str, Any]) -> None:
        found, before = tuple(shape), {*sizes}
        if argument.ellipsis:
            found = found[max(len(found) - len(argument.sizes), 0) :]
        elif argument.extends and all(size == 1 for size in found[len(argument.sizes) :]):
            found = found[: len(argument.sizes)]
        fits = len(found) == len(argument.sizes)
        for size, actual in zip(argument.sizes, found, strict=False):
            if not fits:
                break
            fits = actual >= size.least
            if fits and size.defines:
                solved = size.solve(actual, sizes)
                fits = solved is not None
                sizes[size.defines] = solved
            elif fits:
                fits = actual == size.expression.value(sizes)
        if not fits:
            letters = {name for size in argument.sizes for name in size.expression.names}
            known = ", ".join(
                f"{name} = {sizes[name]}" for name in self.variables if name in letters and name in before
            )
            wanted = f"the shape [{', '.join(argument.text.split())}]{known and f' with {known}'}"
            if any(size < 1 for size in shape[1:]):
                wanted += ", none of them empty"
            self._fail(argument, wanted, list(shape))

    def _check_number(self, argument: NumberArgument, value: Any, sizes: dict[str, Any]) -> None:
        low, high = (None if e is None else e.value(sizes) for e in (argument.low, argument.high))
        fits = argument.integer or math.isfinite(value)
        fits = fits and (low is None or value >= low) and (high is None or value <= high)
        if argument.values:
            fits = any(value == e.value(sizes) for e in argument.values)
        if not fits:
            if argument.values:
                wanted = " or ".join(str(e.value(sizes)) for e in argument.values)
            else:
                wanted = f"in {'' if low is None else low}..{'' if high is None else high}".replace("in ..", "finite")
            raise RuntimeError(
                f"{self.name}: {argument.name} must be {wanted}, got {value if argument.integer else f'{value:g}'}"
            )
        if argument.position >= 0 and argument.integer:
            sizes[argument.name] = value

    def _fail(self, argument: TensorArgument, wanted: str, got: Any) -> None:
        raise RuntimeError(f"{self.name}: {argument.name} must have {wanted}, got {got}")


def _is_fake(t: Tensor) -> bool:
    return isinstance(t, torch._subclasses.FakeTensor) or t.is_meta


def _as_lines(t: Tensor, reference: Tensor) -> Tensor:
    """Returns lines ``[N, C, L]``, t itself if they are dense as the map or the lines ``reference`` demand."""
    if reference.dim() == 4:
        inside = memory_format(reference) == torch.channels_last
    else:
        inside = not reference.is_contiguous() and (t is not reference or t.mT.is_contiguous())
    if inside:
        return t if t.mT.is_contiguous() else t.mT.contiguous().mT
    return t if t.is_contiguous() else t.contiguous()
