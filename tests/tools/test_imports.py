"""Imports go down the layers of the package, as CONTRIBUTING draws them; read from the sources, nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

NAME = "visattn_fast"
PACKAGE = Path(__file__).parents[2] / NAME

# A layer imports from itself and from the layers to its right.
DRAWING = (
    "cli -> report, watch -> integrations -> models -> catalogue -> modules, functional"
    " -> fused, explain -> backends -> ops -> reference"
)
# Beside the layers -> the layers that import it. It imports none of them itself.
BESIDE = {
    "measure": ("report", "integrations"),
    "native": ("report", "backends", "ops"),
    "replicas": ("watch", "backends"),
    "kernels": ("ops",),
    NAME: ("cli", "report", "native"),  # for the version
}
# The same for the folders of kernels.
FLOORS = "experimental -> ops -> attention, passes -> core"
ON_FIRST_USE = ("kernels",)  # imported inside functions only
OUTSIDE = {
    "kernels": ("torch", "triton"),
    "integrations": (
        "torch",
        "timm",
        "torchvision",
        "monai",
        "segmentation_models_pytorch",
        "transformers",
        "ultralytics",
    ),
    "report": ("torch", "matplotlib", "numpy", "PIL", "rich"),
}  # all others: torch
ANYWHERE = (*sys.stdlib_module_names, "typing_extensions")  # torch requires the latter
DOORS = ("__init__", "__main__")  # outside the layers


def levels(drawing: str) -> dict[str, int]:
    return {name: level for level, names in enumerate(drawing.split(" -> ")) for name in names.split(", ")}


LAYERS, KERNEL_FLOORS = levels(DRAWING), levels(FLOORS)


class Import(NamedTuple):
    """An import: the module, as its parts, and whether it stands inside a function."""

    module: tuple[str, ...]
    inside: bool
    line: int


def imports(module: tuple[str, ...], source: str) -> Iterator[Import]:
    """Yields the imports of a module, and strings that name a module of the package, for ``import_module``."""
    nodes = [(ast.parse(source), False)]
    for node, inside in nodes:
        nodes += [(n, inside or isinstance(n, ast.FunctionDef)) for n in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            found = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = module[: -node.level] if node.level else ()
            base = start + tuple(node.module.split(".") if node.module else ())
            found = [(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Constant) and str(node.value).startswith(f"{NAME}."):
            found = [tuple(node.value.split("."))]
        else:
            continue
        yield from (Import(parts, inside, node.lineno) for parts in found)


def faults(module: tuple[str, ...], source: str) -> list[str]:
    """Returns the imports of a module that break a rule, in words."""
    layer, found = module[1], []
    for parts, inside, line in imports(module, source):
        if parts[0] != NAME:
            known = OUTSIDE.get(layer, ("torch",))
            wrong = "" if parts[0] in (*known, *ANYWHERE) else f"{layer} imports {parts[0]}"
        else:
            wrong = _upward(module, parts)
            if not wrong and parts[1:2] == ON_FIRST_USE and layer != parts[1] and not inside:
                wrong = f"{layer} imports {parts[1]} before its first use"
        if wrong:
            found.append(f"{'/'.join(module)}.py:{line}: {wrong}")
    return found


def _upward(module: tuple[str, ...], parts: tuple[str, ...]) -> str:
    layer, other, order = module[1], parts[1] if len(parts) > 1 and parts[1] in (*LAYERS, *BESIDE) else NAME, LAYERS
    if layer == other == "kernels":
        layer, other, order = module[2], parts[2], KERNEL_FLOORS
    if layer == other or layer in BESIDE.get(other, ()):
        return ""
    down = layer in order and other in order and order[layer] < order[other]
    return "" if down else f"{layer} imports {other}"


def sources() -> dict[tuple[str, ...], str]:
    """Returns the sources of the package by module; ``kernels`` is a link, which rglob may not follow."""
    roots = {(NAME,): PACKAGE, (NAME, "kernels"): (PACKAGE / "kernels").resolve()}
    return {
        (*prefix, *file.relative_to(root).with_suffix("").parts): file.read_text(encoding="utf-8")
        for prefix, root in roots.items()
        for file in sorted(root.rglob("*.py"))
    }


def test_imports_go_down():
    found = [
        fault for module, source in sources().items() if module[1] not in DOORS for fault in faults(module, source)
    ]
    assert not found, "\n".join(found)


def test_contributing_shows_the_drawing():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert DRAWING in text
    assert FLOORS in text


def test_every_module_has_a_place():
    """A new folder gets a place in these lists, and a folder that is gone leaves them."""
    modules = sources()
    assert {module[1] for module in modules} == {*LAYERS, *BESIDE, *DOORS} - {NAME}
    assert {module[2] for module in modules if module[1] == "kernels"} == set(KERNEL_FLOORS)


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("ops/se", "from ..report import rows", "ops imports report"),
        ("ops/se", "from .. import fused", "ops imports fused"),
        ("backends", "from .fused import se", "backends imports fused"),
        ("fused/se", "from ..functional import eca", "fused imports functional"),
        ("functional", "from .modules import FastSE", "functional imports modules"),
        ("measure/timing", "from ..report.cases import Case", "measure imports report"),
        ("measure/timing", "from .. import reference", "measure imports reference"),
        ("fused/se", "from ..measure import timing", "fused imports measure"),
        ("reference/se", "import visattn_fast.ops", "reference imports ops"),
        ("reference/se", "import numpy", "reference imports numpy"),
        ("ops/se", "import triton", "ops imports triton"),
        ("kernels/ops/se", "from ...reference import se", "kernels imports reference"),
        ("kernels/core/tiles", "from ..passes.pool import combine", "core imports passes"),
        ("ops/library", "from ..kernels import ops", "ops imports kernels before its first use"),
        ("fused/se", 'def f(): import_module("visattn_fast.kernels.ops.se")', "fused imports kernels"),
    ],
)
def test_a_fault_is_found(module, line, fault):
    (found,) = faults((NAME, *module.split("/")), line)
    assert found == f"{NAME}/{module}.py:1: {fault}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("cli", "from . import __version__"),
        ("cli", 'COMMAND = "visattn_fast.report.info"'),
        ("report/machine", "import visattn_fast"),
        ("report/whole_model", "from ..integrations import accelerate"),
        ("integrations/verify", "from ..measure.timing import Effort"),
        ("integrations/timm", "import math\nfrom timm.layers import SEModule"),
        ("ops/library", 'def f(): import_module(f"visattn_fast.kernels.ops.{name}")'),
        ("ops/se", "from .library import define\nfrom ..reference.checks import GATES"),
        ("kernels/ops/se", "import triton\nfrom ..core.tiles import NONE\nfrom . import eca"),
    ],
)
def test_a_sound_import_passes(module, line):
    assert not faults((NAME, *module.split("/")), line)
