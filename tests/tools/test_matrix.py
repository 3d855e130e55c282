"""`make matrix`: its table in the README, the pins of its cells, failures by name, interpreters that are missing."""

from __future__ import annotations

import json
import re
import sys

import pytest

pytest.importorskip("triton")
matrix = pytest.importorskip("tools.matrix", reason="not beside the repository's tools")


def pins(text):
    return dict(re.findall(r"^([\w.-]+)==([^;\s]+)", text, re.MULTILINE))


def test_the_readme_shows_the_results():
    text = matrix.README.read_text(encoding="utf-8")
    assert f"{matrix.BEGIN}{matrix.table()}{matrix.END}" in text, "python -m tools.matrix --table"


def test_pages_and_metadata_ask_for_the_oldest_releases():
    oldest = next(iter(matrix.CELLS.values()))
    torch, triton = (version.rpartition(".")[0] for version in (oldest.torch, oldest.triton))
    needed = (
        f"Python {oldest.python} or newer, torch {torch} or newer, and for the GPU kernels triton {triton} or newer"
    )
    for page, words in {
        "README.md": f"Requires Python {oldest.python} and torch {torch}, or newer.",
        "docs/guide/install.md": needed,
        "pyproject.toml": f'requires-python = ">={oldest.python}"',
    }.items():
        assert words in (matrix.ROOT / page).read_text(encoding="utf-8"), page
    metadata = (matrix.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={torch}"' in metadata
    assert f'"triton>={triton};' in metadata


def test_the_development_environment_is_a_cell():
    own = pins((matrix.ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {cell[1:] for cell in matrix.CELLS.values()} >= {(own["torch"], own["triton"], own["torchvision"])}


@pytest.mark.parametrize("cell", matrix.CELLS.values(), ids=matrix.CELLS.keys())
def test_a_cell_takes_every_other_pin(cell):
    constraints = (matrix.ROOT / "constraints.txt").read_text(encoding="utf-8")
    taken, own = pins(matrix.requirements(cell)), pins(constraints)
    assert taken.keys() == own.keys() - {"torch", "triton"}
    assert taken["torchvision"] == cell.torchvision
    assert "python_version" in matrix.requirements(cell)


def test_runs_are_recorded_and_failures_named(tmp_path, monkeypatch, capsys):
    """A suite of three tests; another cell and the other suite keep their results."""
    (tmp_path / "test_small.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): raise ValueError\ndef test_left(): pytest.skip('so')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    first, *_, last = matrix.CELLS
    kept = {**matrix.CELLS[last]._asdict(), "suites": {"plain": {"passed": 1234, "failed": []}}}
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "README", tmp_path / "README.md")
    monkeypatch.setattr(matrix, "environment", lambda *_: sys.executable)
    monkeypatch.setattr(matrix, "find_interpreter", lambda _: sys.executable)
    monkeypatch.setattr(matrix, "LOADS", "")
    matrix.README.write_text(f"Before\n{matrix.BEGIN}old\n{matrix.END}After\n")
    matrix.RESULTS.write_text(json.dumps({last: kept}))

    assert matrix.main(["--cell", first, "--only", "plain", "--processes", "0"]) == 1
    assert f"{first}: plain: test_small.py::test_bad" in capsys.readouterr().out
    found = json.loads(matrix.RESULTS.read_text())
    assert list(found) == [first, last]
    assert found[last] == kept
    suite = found[first]["suites"]["plain"]
    assert (suite["passed"], suite["skipped"], suite["failed"]) == (1, 1, ["test_small.py::test_bad"])
    text = matrix.README.read_text()
    rows = [line.partition("| ")[2] for line in text.splitlines() if line.startswith("| 3.")]
    assert [row.split(" | ", 3)[3] for row in rows] == [
        "1 passed, **1 failed** | not run yet |",
        *["not run yet | not run yet |"] * (len(matrix.CELLS) - 2),
        "1,234 passed | not run yet |",
    ]
    assert text.startswith("Before\n")
    assert text.endswith("After\n")
    assert "old" not in text

    before = matrix.RESULTS.read_text()
    assert matrix.main(["--cell", first, "--only", "plain", "--processes", "0", "--", "-k", "good"]) == 0
    assert matrix.RESULTS.read_text() == before, "a part is not recorded"
    assert matrix.main(["--cell", first, "--only", "plain", "--processes", "0", "--", "no_such_file.py"]) == 1
    assert "pytest ended with exit status 4" in capsys.readouterr().out


def test_a_native_library_that_does_not_load_fails_the_cell(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "environment", lambda *_: sys.executable)
    monkeypatch.setattr(matrix, "find_interpreter", lambda _: sys.executable)
    monkeypatch.setattr(matrix, "write_table", lambda: None)
    monkeypatch.setenv("VISATTN_LIBRARY", "/nowhere.so")
    name = next(iter(matrix.CELLS))
    assert matrix.main(["--cell", name]) == 1
    assert f"{name}: the native library was not built: VISATTN_LIBRARY is /nowhere.so" in capsys.readouterr().out


def test_a_cell_without_interpreter_is_left_out(tmp_path, monkeypatch, capsys):
    """pyenv's shims are on PATH, but fail unless that version is chosen."""
    shim = tmp_path / "python3.10"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(matrix, "PYENV", tmp_path / "versions")
    monkeypatch.setattr(matrix, "write_table", lambda: None)
    assert matrix.main(["--cell", "py3.10-torch2.11.0"]) == 0
    assert "py3.10-torch2.11.0: left out: no Python 3.10 on PATH" in capsys.readouterr().out
    for version in ("3.10.9", "3.10.13", "3.11.1"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin" / "python").symlink_to(sys.executable)
    assert matrix.find_interpreter("3.10") == str(tmp_path / "versions" / "3.10.13" / "bin" / "python")


def test_the_workflow_runs_every_cell():
    workflow = (matrix.ROOT / ".github" / "workflows" / "sanitizers.yml").read_text(encoding="utf-8")
    listed = re.findall(r'python: "([\d.]+)", torch: "([\d.]+)"', workflow)
    assert listed == [cell[:2] for cell in matrix.CELLS.values()]
