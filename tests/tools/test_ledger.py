"""The ledger docs/internals/evidence.md: in step with the package, and its GPU claims come from results."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from visattn_fast import catalogue
from visattn_fast.backends import backends

pytest.importorskip("triton")
ledger = pytest.importorskip("tools.ledger", reason="not beside the repository's tools")


def test_ledger_lists_every_module_and_target():
    text = ledger.LEDGER.read_text(encoding="utf-8")
    for entry in filter(ledger.on_triton, catalogue.ENTRIES.values()):
        for row in (entry.name, f"{entry.name}_fwd", f"{entry.name}_bwd"):
            assert f"| {row} |" in text, f"{row} is missing: make evidence"
    for target in ledger.compiled.TARGETS:
        assert f"| {target} |" in text


def test_ledger_leaves_out_modules_without_kernels():
    """PyTorch serves them on GPUs, so their tests under the interpreter prove nothing about Triton."""
    text = ledger.LEDGER.read_text(encoding="utf-8")
    for entry in catalogue.ENTRIES.values():
        assert ledger.on_triton(entry) or not re.search(rf"\| {entry.name}(_fwd|_bwd)? \|", text), entry.name
    assert "| 0.00 N |" not in text
    counts = {"se": Counter(passed=3), "criss_cross": Counter(passed=2)}
    shown = ledger.parity_table(counts)
    assert "| se | 3 | 0 | 0 |" in shown
    assert "| criss_cross |" not in shown
    assert "served by PyTorch: criss_cross." in shown
    assert "of se and eca, which keep an image on the chip" in ledger.resident_line(Counter(passed=3))


def test_gpu_claims_come_from_results():
    results = ledger.gpu_results()
    text = ledger.LEDGER.read_text(encoding="utf-8")
    assert ledger.gpu_section(results) in text, "make evidence"
    assert ("Not yet run on a GPU" in text) == (not results)
    if not results:
        assert backends("cuda")["triton"].opt_in
        for page in ("README.md", "docs/internals/cuda.md"):
            assert re.search(r"not\s+(yet )?run on a GPU", (ledger.ROOT / page).read_text(encoding="utf-8")), page


def test_gpu_result_is_shown(tmp_path, monkeypatch):
    """Its section has the card, the tests and the speeds."""
    case = {"op": "se", "shape": [2, 8, 4, 4], "dtype": "bfloat16", "layout": "nchw", "mode": "forward", "x_bytes": 512}
    rows = [
        case | {"contender": contender, "p50_ms": time, "x_of_copy": time}
        for contender, time in (("copy", 1.0), ("eager", 6.0), ("compile", 3.0), ("fused", 1.5))
    ]
    result = {
        "date": "2000-01-01T00:00:00+00:00",
        "machine": {"device_name": "A card", "commit": "abc", "torch": "2", "triton": "3"},
        "tests": {"summary": "7 passed"},
        "sanitizer": "0 errors",
        "rows": rows,
        "native_cuda": [case | {"contender": "fused", "p50_ms": 1.1, "x_of_copy": 1.1}],
        "triton_resident": [],
        "left_out": [],
        "rehearsal": False,
        "complete": True,
    }
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    (tmp_path / "2000-01-01.json").write_text(json.dumps(result))
    text = ledger.gpu_section(ledger.gpu_results())
    assert "### A card, 2000-01-01, commit abc" in text
    assert "Tests: 7 passed." in text
    assert "| se | forward | 1 | 1.50 | 4.00 | 2.00 |" in text
    assert "| native CUDA | se | forward | 1 | 1.10 | 1.50 |" in text


def test_native_kernels_are_listed(monkeypatch):
    """Emulated and compiled ones, or why there are none."""
    objects = ledger.cuda_objects
    symbol = "_Z20channel_scale_kernelILb1ELi0ELb1EN14ChannelForwardIN3c108BFloat16E"
    kernels = [objects.Compiled(symbol, "sm_90", registers, 8 * (registers > 99), Counter()) for registers in (40, 100)]
    assert kernels[0].variant
    assert "| channel_scale forward | cluster | sm_90 | 2 | 100 | 8 | " in ledger.native_table(kernels)
    row = ("SE forward", "nchw", "sm_90", 1, "cluster", 2, 3, 1, "2.00")
    monkeypatch.setattr(ledger.emulation, "counts", lambda: ([row], []))
    monkeypatch.setattr(ledger.emulation, "why_not", lambda: None)
    assert "| SE forward | nchw | sm_90 | 1 | cluster | 2 | 3 | 1 | 2.00 |" in ledger.emulation_section()
    for tool, section in ((ledger.emulation, ledger.emulation_section), (objects, ledger.native_section)):
        monkeypatch.setattr(tool, "why_not", lambda: "needs a compiler")
        assert "on the machine that wrote this: needs a compiler." in section()
