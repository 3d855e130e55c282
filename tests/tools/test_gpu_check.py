"""`make gpu-check` without a GPU: its steps on the CPU, its JSON in the ledger, runs that are cut short."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from visattn_fast import catalogue

pytest.importorskip("triton")
gpu_check = pytest.importorskip("tools.gpu_check", reason="not beside the repository's tools")
ledger = gpu_check.ledger


def written(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_rehearsal_takes_every_step(tmp_path, monkeypatch, capsys):
    """The tests are those of one small file."""
    monkeypatch.setattr(gpu_check, "TESTS", {"small": (1.0, ("tests/cuda/test_cuda_objects.py",))})
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path)]) == 0
    result = written(tmp_path)
    assert result["complete"]
    assert re.match(r"small: \d+ tests collected in ", result["tests"]["summary"])
    assert result["sanitizer"] == "compute-sanitizer, 2 small runs: no error"
    assert {row["contender"] for row in result["rows"]} == {"copy", "eager", "fused"}
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in result["rows"])
    assert all(row["peak_bytes"] for row in result["rows"] if row["contender"] != "copy")
    assert len(result["triton_resident"]) == 2 * len(result["rows"]) // 3  # copy and fused
    assert [why.partition(":")[0] for why in result["left_out"]] == ["native CUDA kernels"]
    text = ledger.result_section(result)
    assert text in capsys.readouterr().out
    for line in (
        "A rehearsal: nothing was measured.",
        "| se | both | 2 | ",
        "| Triton, resident | se | forward | 2 | ",
    ):
        assert line in text
    monkeypatch.setattr(ledger, "RESULTS", tmp_path)
    assert not ledger.gpu_results(), "a rehearsal is no result"


def test_groups_name_existing_tests():
    files = {part for _, parts in gpu_check.TESTS.values() for part in parts if part.startswith("tests/")}
    assert all((gpu_check.ROOT / file).exists() for file in files)
    assert sum(share for share, _ in gpu_check.TESTS.values()) == pytest.approx(1)
    text = "".join((gpu_check.ROOT / file).read_text() for file in files)
    assert "def test_more_than_2_to_31_elements(" in text
    assert "def test_fuzzed_calls_match_reference(" in text


def test_common_gates_come_first():
    plan = gpu_check.Plan(torch.device("cpu"))
    cases = plan.cases()
    assert len(cases) == len(set(cases)) == len(plan.modules) * len(plan.shapes) * 4
    assert {(case.op, case.shape) for case in cases[:12]} == {(op, plan.shapes[0]) for op in gpu_check.FIRST}
    assert {entry.name for entry in catalogue.ENTRIES.values() if entry.resident} <= set(gpu_check.FIRST)


def test_streamed_case_is_not_called_resident():
    kept = [gpu_check.Case("se", shape, "bfloat16") for shape in gpu_check.SHAPES]
    streamed = gpu_check.Case("se", (1, 2048, 150, 150), "bfloat16")
    assert [gpu_check._kept_on_chip(case, torch.device("cpu")) for case in [*kept, streamed]] == [True] * 3 + [False]


def test_run_cut_short_keeps_its_results(tmp_path, monkeypatch):
    """Even in the middle of a case."""
    measure, calls = gpu_check.measure, []

    def third_ends(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(gpu_check, "measure", third_ends)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run(gpu_check.rehearsal(("rows",)), tmp_path)
    result = written(tmp_path)
    assert not result["complete"]
    assert {row["mode"] for row in result["rows"]} == {"forward"}
    assert result["triton_resident"]
    assert "Cut short" in ledger.result_section(result)


def test_cases_left_out_are_named(tmp_path, monkeypatch):
    """Cases that fail, and cases without time left."""

    def fails(*args):
        raise torch.OutOfMemoryError("too little")

    monkeypatch.setattr(gpu_check, "measure", fails)
    gpu_check.run(gpu_check.rehearsal(("rows",)), tmp_path)
    assert "rows: se 1x8x6x5 float32 nchw forward: OutOfMemoryError: too little" in written(tmp_path)["left_out"]
    (tmp_path / "none").mkdir()
    gpu_check.run(gpu_check.rehearsal(("rows",), seconds=-1.0), tmp_path / "none")
    assert written(tmp_path / "none")["left_out"][1:] == list(map(str, gpu_check.rehearsal(()).cases()))


def test_process_past_its_limit_is_stopped(monkeypatch):
    """It is interrupted, then killed; its output is kept."""
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('here', flush=True); time.sleep(60)"
    )
    assert gpu_check.bounded([sys.executable, "-c", deaf], 1.0) == (None, "here\n")
    monkeypatch.setattr(gpu_check, "GRACE", 20.0)
    hears = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts without it
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('heard')"
    )
    assert gpu_check.bounded([sys.executable, "-c", hears], 3.0) == (None, "heard\n")
    assert gpu_check.bounded([sys.executable, "-c", "raise SystemExit(3)"], 20.0) == (3, "")


def test_exit_status_is_that_of_the_tests(tmp_path, monkeypatch):
    outcomes = iter(
        [
            (0, "4 passed in 1.00s"),
            (5, "no tests ran in 0.1s"),
            (1, "FAILED a::b - no\n= 1 failed, 2 passed in 0.10s ="),
            (None, "tests/c.py::e[cuda] FAILED [ 50%]\ntests/c.py::f PASSED [100%]"),
            (None, "FAILED c::d - no\n= 1 failed, 1 passed in 9.00s (0:00:09) ="),
        ]
    )
    monkeypatch.setattr(gpu_check, "bounded", lambda *args, **environment: next(outcomes))
    assert gpu_check.run(gpu_check.rehearsal(("tests",)), tmp_path) == 1
    tests = written(tmp_path)["tests"]
    assert tests["failed"] == ["FAILED a::b - no", "tests/c.py::e[cuda] FAILED", "FAILED c::d - no"]
    assert tests["summary"] == (
        "on a GPU: 4 passed in 1.00s; parity: no tests ran in 0.1s; native CUDA: 1 failed, 2 passed in 0.10s;"
        " more of the kernels: no summary, exit status None (cut short);"
        " over 2^31 elements: 1 failed, 1 passed in 9.00s (0:00:09) (cut short)"
    )


def test_failed_step_leaves_the_others(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError("no such tool")

    monkeypatch.setitem(gpu_check.STEPS, "sanitizer", fails)
    gpu_check.run(gpu_check.rehearsal(("sanitizer", "rows")), tmp_path)
    result = written(tmp_path)
    assert result["complete"]
    assert result["rows"]
    assert "the rest of sanitizer: OSError: no such tool" in result["left_out"]


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (0, "ran triton se \n========= ERROR SUMMARY: 0 errors", "1 small runs: no error"),
        (
            1,
            "ran triton se \n========= Invalid __global__ read of size 4 bytes\n=========     at _pool_kernel+0x10\n"
            "========= ERROR SUMMARY: 2 errors",
            "1 small runs: 2 errors; Invalid __global__ read of size 4 bytes",
        ),
        (None, "ran a\nfailed triton eca  ValueError no", "1 small runs, 1 failed, cut short: no error; failed triton"),
        (139, "ran a\nSegmentation fault", "1 small runs: exit status 139: ['Segmentation fault']"),
    ],
)
def test_sanitizer_output_is_summed_up(status, text, said):
    assert gpu_check._sanitizer_says(status, text).startswith(said)
