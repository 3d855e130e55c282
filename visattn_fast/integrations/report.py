"""What `accelerate` did: which modules it swapped, which it left alone, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .recipe import Recipe


@dataclass
class Swapped:
    """A module that has the fused forward.

    Attributes:
        name: its qualified name.
        module: itself.
        saved_bytes: what it no longer keeps from forward to backward, on the example; None without one.
        speedup: the original's time over its own, forward and backward (forward alone where the model is in eval
            mode), on the example; None without one.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    saved_bytes: int | None = None
    speedup: float | None = None

    @property
    def op(self) -> str:
        """What its forward is now: a function of `functional`, or the epilogue of a block's gate."""
        return self.recipe.op

    @property
    def less(self) -> str:
        """`saved_bytes` in words; without an example what is expected, in multiples of the module's input."""
        if self.saved_bytes is not None:
            return f"{self.saved_bytes / 2**20:.1f} MB"
        from .expected import expected_saving  # which needs more of torch than the package itself does

        expected = expected_saving(self.module, self.recipe)
        return "" if expected is None else f"{expected:.1f} x"

    @property
    def kind(self) -> str:
        """The name of the class that it had."""
        return self.recipe.original.__name__


@dataclass(frozen=True)
class Skipped:
    """A module of a known kind that was left alone, or put back."""

    name: str
    kind: str
    reason: str


@dataclass
class Acceleration:
    """The result of `accelerate`; printed, it is a table.

    Attributes:
        swapped, skipped: every module that is known, by qualified name.
        backend: that serves the example, or without one maps of the parameters' device and dtype; empty where there
            are neither.
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
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.skipped)} left alone"])
