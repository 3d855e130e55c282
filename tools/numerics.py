"""Errors of every module against float64, beside eager PyTorch's: ``python -m tools.numerics``.

Prints the tables of docs/guide/numerics.md. An error is the largest difference from the reference in float64, relative
to the largest value of the tensor. ``--guard`` lists instead the tensors that the fused module gets more than twice as
wrong as eager PyTorch does, and fails if there are any.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visattn_fast.catalogue import ENTRIES, LAYOUTS, Entry, feature_map
from visattn_fast.measure.accuracy import Oracle

Shape = tuple[int, int, int, int]

SHAPE: Shape = (4, 64, 20, 20)
TALL: Shape = (1, 1, 4096, 4104)  # more pixels than float32 has integers
TALL_MODULES = ("eca", "spatial_attention", "simam")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _rank_one(x: Tensor) -> Tensor:
    return x[:, :, :1, :1] * x[:, :1]


def _ill_conditioned(x: Tensor) -> Tensor:
    return x * torch.logspace(0, -3, x.shape[1], dtype=x.dtype)[:, None, None]


# What becomes of a map drawn from a normal distribution in float64.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "standard": lambda x: x,
    "mean 100": lambda x: x + 100,
    "mean 1000": lambda x: x + 1000,
    "0.1": lambda x: torch.full_like(x, 0.1),
    "rank 1": _rank_one,
    "ill-conditioned": _ill_conditioned,
}


@dataclass(frozen=True)
class Case:
    """A module of the catalogue and the map that it gets."""

    entry: Entry
    shape: Shape
    layout: str
    dtype: str
    input: str = "standard"

    def x(self) -> Tensor:
        """Draws the map."""
        x = INPUTS[self.input](feature_map(self.shape, "nchw", torch.float64))
        return x.to(DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])

    def __str__(self) -> str:
        return f"{self.entry.name} {'x'.join(map(str, self.shape))} {self.layout} {self.dtype} {self.input}"


@dataclass(frozen=True)
class Errors:
    """The errors of a case's tensors by name: ``y``, ``dx``, and ``d`` before the name of a parameter.

    Attributes:
        worse: a text for each tensor that the fused module gets more than twice as wrong as eager PyTorch, and wrong by
            more than a few units in the last place or one rounding of the parameters.
    """

    case: Case
    fused: dict[str, float]
    eager: dict[str, float]
    compiled: dict[str, float]
    worse: list[str]


def results(module: nn.Module, x: Tensor, noise: float = 0.0) -> dict[str, Tensor]:
    """Returns y and all gradients, for a gradient of y drawn from a normal distribution.

    Parameters and this gradient deviate by ``noise``, relatively.
    """
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(0)

    def deviating(t: Tensor) -> Tensor:
        return t * (1 + noise * torch.randn(t.shape, generator=generator, dtype=t.dtype)) if noise else t

    with torch.no_grad():
        for p in module.parameters():
            p.copy_(deviating(p))
    x = x.detach().requires_grad_()
    y = module(x)
    grad = feature_map(tuple(y.shape), "nchw", torch.float64, seed=1).to(x.dtype)
    wanted = {"dx": x, **{f"d{name}": p for name, p in module.named_parameters()}}
    found = torch.autograd.grad(y, list(wanted.values()), deviating(grad), allow_unused=True)
    return {"y": y.detach(), **{n: d for n, d in zip(wanted, found, strict=True) if d is not None}}


def measure(case: Case, with_compile: bool = False) -> Errors:
    """Returns the errors of the fused module, of eager PyTorch, and on request of torch.compile."""
    x, dtype = case.x(), DTYPES[case.dtype]
    fast, plain = case.entry.pair(case.shape[1], dtype)
    double, eps = copy.deepcopy(plain).double(), torch.finfo(dtype).eps
    oracle = Oracle(results(double, x.double()), results(double, x.double(), eps))
    fused, eager = _errors(oracle, results(fast, x)), _errors(oracle, results(plain, x))
    compiled = _errors(oracle, _compiled(plain, x)) if with_compile else {}
    worse = [f"{case}: {text}" for text in oracle.above_budget(fused, eager, dtype, rounded=1)]
    return Errors(case, fused, eager, compiled, worse)


def _errors(oracle: Oracle, run: dict[str, Tensor]) -> dict[str, float]:
    """Returns the error of each tensor; infinity if it is not finite."""
    finite = {name: t if t.isfinite().all() else torch.zeros_like(t) for name, t in run.items()}
    return {name: e if finite[name] is run[name] else float("inf") for name, e in oracle.errors(finite).items()}


def _compiled(plain: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.compiler.reset()
    module = copy.deepcopy(plain)
    module.forward = torch.compile(module.forward)
    return results(module, x)


def cases(inputs: Sequence[str], only: Sequence[str] = ()) -> list[Case]:
    """Returns a case for each input, module, dtype and layout."""
    found = product(inputs, ENTRIES.values(), DTYPES, LAYOUTS)
    return [
        Case(entry, SHAPE, layout, dtype, name)
        for name, entry, dtype, layout in found
        if entry.name in only or not only
    ]


class Section(NamedTuple):
    """A table of the page."""

    heading: str
    cases: list[Case]


def sections(only: Sequence[str] = ()) -> list[Section]:
    """Returns the tables."""
    tall = [e for e in TALL_MODULES if not only or e in only]
    return [
        Section("Standard input", cases(("standard",), only)),
        Section("A mean of 100 and of 1,000 standard deviations", cases(("mean 100", "mean 1000"), only)),
        Section("Covariances that are hard to invert", cases(("rank 1", "ill-conditioned"), only or ("soca",))),
        Section(
            f"More than 2^24 pixels: {TALL[2]} x {TALL[3]}, one channel",
            [Case(ENTRIES[e], TALL, "nchw", "fp32", name) for name in ("standard", "0.1") for e in tall],
        ),
    ]


def table(found: Sequence[Errors]) -> str:
    """Returns a table in Markdown: the errors of y, dx and the worst parameter gradient, in the worse layout."""
    lines = ["| module | input | dtype | y | dx | parameters |", "| --- | --- | --- | --- | --- | --- |"]
    key = attrgetter("case.entry.name", "case.input", "case.dtype")
    for titles, layouts in groupby((e for e in found if e.case.entry.main), key):
        lines.append(f"| {' | '.join([*titles, *_figures(list(layouts))])} |")
    return "\n".join(lines)


def _figures(found: Sequence[Errors]) -> list[str]:
    """Returns the cells ``fused / eager [/ compiled]`` of y, dx and the parameters, each the largest of the cases."""

    def worst(contender: str, tensor: str) -> float | None:
        runs = [getattr(errors, contender) for errors in found]
        named = [e for run in runs for n, e in run.items() if n == tensor or (not tensor and n not in ("y", "dx"))]
        return max(named, default=None)

    columns = [[worst(who, tensor) for who in ("fused", "eager", "compiled")] for tensor in ("y", "dx", "")]
    return [" / ".join(f"{error:.1e}" for error in column if error is not None) for column in columns]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    parser.add_argument("--guard", action="store_true", help="list what is more than twice as wrong as eager, and fail")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODULE", help="names of the catalogue")
    given = parser.parse_args(arguments)
    wrong: list[str] = []
    for section in sections(given.only):
        found = [measure(case, given.compile) for case in section.cases]
        wrong += [line for errors in found for line in errors.worse]
        if found and not given.guard:
            print(f"### {section.heading}\n\n{table(found)}\n")
    if given.guard:
        print(*wrong, sep="\n", end="\n" if wrong else "")
    return bool(given.guard and wrong)


if __name__ == "__main__":
    sys.exit(main())
