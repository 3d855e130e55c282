"""The examples, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[1] / "examples"


def digits(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "train_digits.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_too_short_a_training_is_reported_as_a_failure():
    """After one epoch the curves coincide, the accuracy is not there, and the example says so."""
    done = digits("--epochs", "1")
    assert done.returncode == 1, done.stderr
    assert "coincide" not in done.stdout
    assert "FAILED  fused: held-out accuracy" in done.stderr
    assert "off by" not in done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert rows[-3:] == ["reference", "fused", "nudged"]


@pytest.mark.parametrize("options", [("--epochs", "0"), ("--attention", "nonesuch")])
def test_bad_options(options):
    done = digits(*options)
    assert done.returncode == 2
    assert f"argument {options[0]}" in done.stderr
