"""The examples run as a user starts them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from visattn_fast.models import GATES

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_train_digits_fails_after_too_short_a_training():
    """After one epoch the curves coincide, but the accuracy is too low."""
    done = example("train_digits", "--epochs", "1")
    assert done.returncode == 1, done.stderr
    assert "coincide" not in done.stdout
    assert "FAILED  fused: held-out accuracy" in done.stderr
    assert "off by" not in done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert rows[-3:] == ["reference", "fused", "nudged"]


def test_compare_gates_prints_a_row_for_each_gate():
    pytest.importorskip("rich")
    done = example("compare_gates", "--epochs", "1", "--pixels", "8")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] and line.split()[0] in GATES]
    assert [row[0] for row in rows] == list(GATES)
    for row in rows:
        assert [cell[-1] for cell in row[1:3]] == ["%", "%"]
        assert row[5].endswith("x")
        assert all(float(cell) > 0 for cell in (*row[3:5], *row[6:8]))


@pytest.mark.parametrize("attention", ["cbam", "coord_att"])
def test_finetune_frozen_keeps_tensors_and_saves_memory(attention):
    pytest.importorskip("rich")
    done = example("finetune_frozen", "--epochs", "1", "--pixels", "8", "--attention", attention)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[1:2] == ["layers"]]
    assert [tuple(row[:3]) for row in rows] == [
        (layers, "layers", kind) for layers in ("upper", "all") for kind in ("reference", "fused")
    ]
    assert all(row[7] == "0" and int(row[9]) > 20 for row in rows[:2])
    for frozen, trained in zip(rows[:2], rows[2:], strict=True):
        assert float(frozen[5]) < 0.6 * float(trained[5])


def test_watch_gates_warns_of_the_dead_gate_alone():
    done = example("watch_gates", "--epochs", "1", "--pixels", "8")
    assert done.returncode == 0, done.stderr
    log, _, maps = done.stdout.partition("\n\n")
    dead = [line for line in log.splitlines() if "stages.2.0" in line]
    assert len(dead) == 2
    assert all(line.startswith("WARNING") and line.endswith(": constant") for line in dead)
    assert "stages.0.0.gate.spatial" in log
    names = [line.split()[0] for line in maps.splitlines()]
    assert names == [f"stages.{i}.0.gate.{kind}" for i in range(3) for kind in ("channel", "spatial")]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("train_digits", ("--epochs", "0")),
        ("train_digits", ("--attention", "nonesuch")),
        ("compare_gates", ("--gates", "se,nonesuch")),
        ("compare_gates", ("--pixels", "7")),
        ("finetune_frozen", ("--epochs", "0")),
    ],
)
def test_bad_option_exits_and_is_named(name, options, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert f"argument {options[0]}" in capsys.readouterr().err
