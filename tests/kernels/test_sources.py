"""The sources of kernels/: ops hold launchers alone, private names stay in their file, kernels take few parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from visattn_fast.ops.library import OPS

KERNELS = Path(__file__).parents[2] / "kernels"
files = pytest.mark.parametrize(
    "path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.relative_to(KERNELS).with_suffix("").as_posix()
)


@files
def test_no_private_name_is_imported(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [alias.name for node in imports if node.level for alias in node.names]
    assert not [name for name in names if name.startswith("_")]


@files
def test_kernels_take_few_parameters(path):
    """Pointers, sizes and constants that belong together come as named tuples."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    kernels = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
    assert {f.name: len(f.args.args) for f in kernels if len(f.args.args) > 16} == {}


@pytest.mark.parametrize("path", sorted((KERNELS / "ops").glob("*.py")), ids=lambda path: path.stem)
def test_ops_hold_launchers(path):
    """A pass that serves one gate stands beside its launchers, with underscored names; others stand in passes/."""
    body = ast.parse(path.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    public = {name for name in names if not name.startswith("_")}
    assert public == {name for name, op in OPS.items() if op.launcher == path.stem}
    used = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    assert names - public <= used
