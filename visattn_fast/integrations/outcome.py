"""The outcome of `accelerate`: which modules it swapped, which it left alone, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .recipe import Recipe


@dataclass
class Swapped:
    """A module with the fused forward.

    Attributes:
        name: its qualified name.
        module: the module itself.
        recipe: the recipe that it was swapped by.
        saved_bytes: bytes that it no longer keeps from forward to backward, measured on the example; None without one.
        speedup: time of the original over its own, measured on the example, forward and backward, or forward alone if
            the model is in eval mode; None without an example.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    saved_bytes: int | None = None
    speedup: float | None = None

    @property
    def op(self) -> str:
        """The name of the function in `functional` that serves it as it is now; ``"epilogue"`` for a block."""
        return self.recipe.plan(self.module)[0] or "its own forward"

    @property
    def note(self) -> str:
        """The reason why it calls its layers now; empty if it calls none."""
        return self.recipe.plan(self.module)[1]

    @property
    def less(self) -> str:
        """`saved_bytes` in words; without an example the expected saving, in multiples of the module's input."""
        if self.saved_bytes is not None:
            return f"{self.saved_bytes / 2**20:.1f} MB"
        from .expected import expected_saving  # needs more of torch than the package itself does

        expected = expected_saving(self.module, self.recipe)
        return "" if expected is None else f"{expected:.1f} x"

    @property
    def kind(self) -> str:
        """The name of the original class."""
        return self.recipe.original.__name__


@dataclass(frozen=True)
class Skipped:
    """A module of a known class that was left alone, or put back."""

    name: str
    kind: str
    reason: str


@dataclass
class Acceleration:
    """The result of `accelerate`; it prints as a table.

    Attributes:
        swapped: the modules with the fused forward.
        skipped: the modules of known classes that were left alone.
        backend: the backend that serves the example; without an example, the one that serves maps of the parameters'
            device and dtype; empty if there are neither.
    """

    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    backend: str = ""

    def __str__(self) -> str:
        rows = [("module", "class", "served by", "keeps less", "faster")]
        for s in self.swapped:
            faster = "" if s.speedup is None else f"{s.speedup:.2f}x"
            rows.append((s.name, s.kind, f"{s.op}{' in ' * bool(self.backend)}{self.backend}", s.less, faster))
        rows += [(s.name, s.kind, f"not swapped: {s.reason}", "", "") for s in self.skipped]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
        ]
        lines += [f"{s.name or s.kind} calls its layers: {s.note}" for s in self.swapped if s.note]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.skipped)} left alone"])
