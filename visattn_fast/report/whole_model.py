"""Measures a model as it is, accelerated and without attention: what attention costs, and what `accelerate` saves."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends import use_backend
from ..integrations import accelerate
from ..integrations.accelerate import known
from ..measure.memory import peak_bytes
from ..measure.timing import Effort, interleaved, quantiles
from .machine import Machine
from .results import FORMAT, ReportError
from .tables import Cell, Table, factor, number, tone

VARIANTS = {"without": "without attention", "before": "as it is", "after": "accelerated"}
WAYS = ("eager", "compile")


@dataclass(frozen=True)
class ModelRow:
    """The figures of one variant, run in one way.

    Attributes:
        variant: a key of `VARIANTS`.
        way: one of `WAYS`.
        p20_ms, p50_ms, p80_ms: percentiles of the times of a batch.
        peak_bytes: peak of the bytes allocated.
        compile_s: seconds of the first call, if it is compiled.
    """

    variant: str
    way: str
    rounds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_bytes: int | None
    compile_s: float | None


@dataclass(frozen=True)
class ModelReport:
    """A report of a whole model.

    Attributes:
        machine: the machine that it was measured on.
        settings: the options of the run.
        accelerated: the table that `accelerate` prints.
        seconds: how long the run took.
    """

    machine: Machine
    settings: dict[str, Any]
    accelerated: str
    rows: list[ModelRow] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, variant: str, way: str) -> ModelRow | None:
        """Returns the row of a variant and a way; None if it was not measured."""
        return next((r for r in self.rows if (r.variant, r.way) == (variant, way)), None)

    def tax(self, way: str) -> tuple[float, float] | None:
        """Returns the share of the original's time that attention costs, and the share of this cost that goes away.

        Returns None if a variant was not measured, or attention costs nothing.
        """
        without, before, after = (self.row(variant, way) for variant in VARIANTS)
        if not (without and before and after) or before.p50_ms <= without.p50_ms:
            return None
        cost = before.p50_ms - without.p50_ms
        return cost / before.p50_ms, (before.p50_ms - after.p50_ms) / cost

    def table(self) -> Table:
        """Returns a table with a row for each variant and way."""
        s = self.settings
        what = "training, forward and backward" if s["train"] else "inference"
        title = f"{s['model']}: {what}, {s['batch']} x 3 x {s['size']} x {s['size']} {s['dtype']} {s['layout']}"
        columns = ("model", "way", "images/s", "ms", "20-80 %", "speed-up", "peak MB")
        return Table(title, columns, [self._cells(row) for row in self.rows], 2)

    def verdicts(self) -> list[str]:
        """Returns a sentence for each way on the cost of attention."""
        taxes = {way: self.tax(way) for way in WAYS}
        return [
            f"{way}: attention costs {tax[0]:.1%} of the time; accelerate removes {tax[1]:.0%} of that"
            for way, tax in taxes.items()
            if tax
        ]

    @property
    def facts(self) -> dict[str, Any]:
        """The machine, the versions and the settings."""
        return asdict(self.machine) | self.settings | {"seconds": round(self.seconds)}

    def to_json(self) -> str:
        """Writes the report as JSON, with the verdicts."""
        return json.dumps({"format": FORMAT} | asdict(self) | {"verdicts": self.verdicts()}, indent=1) + "\n"

    @classmethod
    def parse(cls, data: dict[str, Any], path: str | Path) -> ModelReport:
        """Reads the report from the JSON that ``path`` holds. Raises ReportError if there is no report in it."""
        try:
            rows = [ModelRow(**row) for row in data["rows"]]
            return cls(Machine(**data["machine"]), data["settings"], data["accelerated"], rows, data["seconds"])
        except (KeyError, TypeError) as error:
            raise ReportError(f"{path} holds no report of a model: {type(error).__name__}: {error}") from error

    def _cells(self, row: ModelRow) -> list[Cell]:
        before = self.row("before", row.way)
        speedup = before.p50_ms / row.p50_ms if before and row.variant == "after" else None
        peak = None if row.peak_bytes is None else row.peak_bytes / 2**20
        return [
            Cell(VARIANTS[row.variant]),
            Cell(row.way),
            Cell(number(1e3 * self.settings["batch"] / row.p50_ms)),
            Cell(number(row.p50_ms)),
            Cell(f"{number(row.p20_ms)}-{number(row.p80_ms)}"),
            Cell(factor(speedup), tone(speedup, 0.01)),
            Cell(number(peak)),
        ]


def build(spec: str, options: dict[str, Any]) -> nn.Module:
    """Builds a model with random weights.

    Args:
        spec: ``"timm:seresnet50"``, ``"torchvision:mobilenet_v3_small"`` or ``"package.module:function"``.
        options: keyword arguments of the function that builds it.

    Raises:
        ValueError: there is no such model, or its library is missing.
    """
    library, _, name = spec.partition(":")
    if not library or not name:
        raise ValueError(f"a model is timm:NAME, torchvision:NAME or MODULE:FUNCTION, got {spec!r}")
    makers: dict[str, tuple[str, str]] = {
        "timm": ("timm", "create_model"),
        "torchvision": ("torchvision.models", "get_model"),
    }
    try:
        if library in makers:
            module, maker = makers[library]
            model = getattr(importlib.import_module(module), maker)(name, **options)
        else:
            model = getattr(importlib.import_module(library), name)(**options)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{spec} cannot be built: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} must be a torch.nn.Module, got {type(model).__name__}")
    return model


def measure_model(
    model: nn.Module, x: Tensor, train: bool, effort: Effort, ways: tuple[str, ...] = WAYS, backend: str = "auto"
) -> tuple[str, list[ModelRow]]:
    """Measures every variant of a model; the model itself stays as it was.

    Returns:
        The table of `accelerate`, and the rows.

    Raises:
        ValueError: the model has no attention module that `accelerate` knows.
    """
    if not any(type(m) in known() for m in model.modules()):
        raise ValueError("the model has no attention module that accelerate knows")
    model = copy.deepcopy(model).train(train)
    without, after = without_attention(model), copy.deepcopy(model)
    with use_backend(backend):
        found = accelerate(after, x)
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        first: dict[tuple[str, str], float] = {}
        variants = {"without": without, "before": model, "after": after}
        for way in ways:
            for variant, module in ((v, m) for v, m in variants.items() if m):
                run = _run(torch.compile(module) if way == "compile" else module, module, x, train)
                start = time.perf_counter()
                run()
                first[variant, way], runs[variant, way] = time.perf_counter() - start, run
        peaks = {key: peak_bytes(run, x.device) for key, run in runs.items()}
        seconds = interleaved({"/".join(key): run for key, run in runs.items()}, x.device, effort)
    rows = []
    for key, peak in peaks.items():
        times = seconds["/".join(key)]
        p20, p50, p80 = (1e3 * q for q in quantiles(times))
        rows.append(ModelRow(*key, len(times), p20, p50, p80, peak, first[key] if key[1] == "compile" else None))
    return str(found), rows


def without_attention(model: nn.Module) -> nn.Module | None:
    """Returns a copy of the model without its known gates, which return their input instead; None if it has none.

    Attention over positions stays: it is part of a block that does more than scale its input.
    """
    model = copy.deepcopy(model)
    recipes = known()
    names = [n for n, m in model.named_modules() if type(m) in recipes and recipes[type(m)].gate]
    for name in names:
        parent, _, last = name.rpartition(".")
        if not any(name.startswith(f"{outer}.") for outer in names):
            setattr(model.get_submodule(parent), last, nn.Identity())
    return model if names else None


def _run(function: Callable[..., Any], module: nn.Module, x: Tensor, train: bool) -> Callable[[], object]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not train:
        return torch.no_grad()(functools.partial(function, x))

    def step() -> object:
        outputs = [y for y in tree_leaves(function(x)) if isinstance(y, Tensor) and y.requires_grad]
        loss = torch.stack([y.float().square().mean() for y in outputs]).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return step
