"""The lists of public names follow from the files that define them."""

from __future__ import annotations

import pytest

import visattn_fast as vf
from tools import names


def test_lists_are_up_to_date():
    pytest.importorskip("ruff")
    stale = [path.name for path, text in names.texts().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run `make names`: {stale}"


def test_every_public_name_is_reachable():
    for file, exported in names.public("fused").items():
        for name in exported:
            assert hasattr(vf if name.startswith("Fast") else vf.functional, name), f"{name} of fused/{file}.py"
    for file, exported in names.public("reference").items():
        for name in exported:
            assert hasattr(vf.reference, name), f"{name} of reference/{file}.py"


def test_public_names_stay():
    """These names are promised: other people's code and docs use them."""
    promised = {"accelerate", "attention_maps", "backends", "explain", "functional", "reference", "restore"}
    assert promised | {"use_backend", "watch_gates", "FastCBAM", "FastSE"} <= set(vf.__all__)
