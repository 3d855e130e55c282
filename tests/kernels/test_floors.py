"""The floors of kernels/: imports go down only, ops hold launchers alone, kernels take at most 16 parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from visattn_fast.ops.library import OPS

KERNELS = Path(__file__).parents[2] / "kernels"
BELOW = {
    "core": {"core"},
    "passes": {"core", "passes"},
    "attention": {"core", "attention"},
    "ops": {"core", "passes", "attention"},
    "experimental": {"core", "passes", "ops", "experimental"},
}
FILES = sorted(KERNELS.rglob("*.py"))
files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(KERNELS).with_suffix("").as_posix())


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_every_floor_is_here():
    assert {path.relative_to(KERNELS).parts[0] for path in FILES} == set(BELOW)


@files
def test_imports_go_down(path):
    floor, *folders = path.relative_to(KERNELS).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = (floor, *folders[:-1])[: len(folders) + 1 - node.level]
            imported = (*above, *(node.module or "").split("."))[0] or node.names[0].name
            assert imported in BELOW[floor], f"line {node.lineno} imports {imported}"
            assert not any(alias.name.startswith("_") for alias in node.names), f"line {node.lineno}"


@files
def test_kernels_take_few_parameters(path):
    """Pointers, sizes and constants that belong together come as named tuples."""
    kernels = [f for f in functions(path) if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
    assert {f.name: len(f.args.args) for f in kernels if len(f.args.args) > 16} == {}


@pytest.mark.parametrize("path", sorted((KERNELS / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_ops_hold_launchers_alone(path):
    names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert set(names) == {name for name, op in OPS.items() if op.launcher == path.stem}
