"""Saved reports: rendered again, read from an older format, compared with another."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from visattn_fast import cli
from visattn_fast.report.cases import CONTENDERS, DEFAULT_CONTENDERS
from visattn_fast.report.command import write
from visattn_fast.report.machine import describe
from visattn_fast.report.results import Report
from visattn_fast.report.rows import Row

NEW_FIELDS = ("bytes", "kernels", "cold")


def row(op: str, contender: str, ms: float, **more) -> Row:
    found = Row(op, (2, 16, 6, 5), "float32", "nchw", "both", contender, 3840, rounds=5, **more)
    times = {} if found.failure else {"p20_ms": 0.99 * ms, "p50_ms": ms, "p80_ms": 1.01 * ms, "x_of_copy": ms}
    return dataclasses.replace(found, **times)


def report(names=DEFAULT_CONTENDERS, **fused) -> Report:
    """Makes a report of two modules; ``fused`` changes the row of the fused contender in the second."""
    times = {"copy": 1.0, "eager": 8.0, "compile": 4.0, "compile-max-autotune": 3.0, "fused": 2.0, "fused-compile": 2.0}
    times |= {"timm": 9.0, "timm-compile": 5.0}
    rows = [row("se", name, times[name], peak_bytes=7680) for name in ("copy", *names)]
    rows += [row("eca", name, times[name], peak_bytes=7680) for name in ("copy", *names) if name != "fused"]
    rows.append(row("eca", "fused", **{"ms": 2.0, "peak_bytes": 7680, **fused}))
    return Report(describe(torch.device("cpu")), {"backend": "auto"}, [], rows, 1.0)


@pytest.fixture
def saved(tmp_path):
    """Returns a function that saves reports under their names and returns the paths."""

    def save(**reports: Report) -> list[str]:
        paths = []
        for name, found in reports.items():
            paths.append(str(tmp_path / f"{name}.json"))
            (tmp_path / f"{name}.json").write_text(found.to_json())
        return paths

    return save


@pytest.mark.parametrize(
    ("changed", "options", "status", "texts"),
    [
        ({}, (), 0, ["0 regressions and 0 improvements past 1.1x"]),
        ({"ms": 2.1}, (), 0, ["0 regressions"]),
        ({"ms": 2.1}, ("--threshold", "1.02"), 1, ["1 regressions", "regressions: 1", "2.00 ms", "2.10 ms", "1.05x"]),
        ({"ms": 3.0}, (), 1, ["1 regressions", "1.50x", "eca"]),
        ({"ms": 3.0}, ("--in-copies",), 1, ["time / copy", "1.50x"]),
        ({"ms": 1.0}, (), 0, ["1 improvements", "improvements: 1", "0.50x"]),
        ({"peak_bytes": 15360}, (), 1, ["1 regressions", "peak memory", "2.00x"]),
        ({"failure": "AssertionError: wrong"}, (), 1, ["1 regressions", "AssertionError: wrong"]),
    ],
    ids=["same", "little", "past", "slower", "copies", "faster", "memory", "failure"],
)
def test_compare_lists_changes_past_the_threshold(saved, capsys, changed, options, status, texts):
    paths = saved(old=report(), new=report(**changed))
    assert cli.main(["report", "--compare", *paths, *options]) == status
    out = capsys.readouterr().out
    assert all(text in out for text in texts), out


def test_compare_in_copies_ignores_a_slower_machine(saved):
    """Everything takes twice as long on the new machine."""
    old, new = report(), report()
    slow = [dataclasses.replace(r, p50_ms=2 * r.p50_ms) for r in new.rows]
    paths = saved(old=old, new=dataclasses.replace(new, rows=slow))
    assert cli.main(["report", "--compare", *paths]) == 1
    assert cli.main(["report", "--compare", *paths, "--in-copies"]) == 0


def test_compare_names_what_it_cannot_compare(saved, capsys):
    """Cases of one report alone, and differences in machine and versions; rivals do not count."""
    old, new = report(), report()
    new = dataclasses.replace(
        new,
        machine=dataclasses.replace(new.machine, torch="9.9.9"),
        rows=[dataclasses.replace(r, p50_ms=r.p50_ms * (2 if r.contender == "eager" else 1)) for r in new.rows[:-1]],
    )
    assert cli.main(["report", "--compare", *saved(old=old, new=new)]) == 0
    out = capsys.readouterr().out
    assert f"differs: torch: {torch.__version__} -> 9.9.9" in out
    assert "only in old: eca 2x16x6x5 float32 nchw both fused" in out
    assert "eager 2.00x, compile 1.00x" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "holds no report, but a list"),
        ("{}", "holds no report of modules: KeyError: 'rows'"),
        ('{"format": 99}', "has format 99; this version reads 1 and 2"),
        ('{"rows": [{"shape": [1], "nothing": 1}]}', "holds no report of modules: TypeError"),
    ],
)
@pytest.mark.parametrize("option", ["--compare", "--render"])
def test_unreadable_file_is_named(saved, tmp_path, capsys, text, message, option):
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    good = saved(good=report()) if option == "--compare" else []
    assert cli.main(["report", option, *good, str(bad)]) == 2
    assert f"{bad} {message}" in capsys.readouterr().err


def test_threshold_below_1_is_refused(saved, capsys):
    assert cli.main(["report", "--compare", *saved(a=report(), b=report()), "--threshold", "0.5"]) == 2
    assert "--threshold must be at least 1, got 0.5" in capsys.readouterr().err


def test_first_format_is_read(saved, tmp_path):
    """Reports of the first format name no format, and lack the newer fields."""
    (path,) = saved(old=report())
    data = json.loads(Path(path).read_text())
    del data["format"]
    for fields in data["rows"]:
        for name in NEW_FIELDS:
            del fields[name]
    (tmp_path / "first.json").write_text(json.dumps(data))
    assert Report.load(tmp_path / "first.json").rows == report().rows
    assert cli.main(["report", "--compare", path, str(tmp_path / "first.json")]) == 0


def test_render_repeats_markdown_and_page(tmp_path):
    """For all contenders, from the JSON alone."""
    found = report(tuple(CONTENDERS))
    found = dataclasses.replace(found, rows=[r for r in found.rows if r.op == "se"])
    written = write(found, tmp_path / "a")
    assert cli.main(["report", "--render", str(tmp_path / "a" / "report.json"), "--out", str(tmp_path / "b")]) == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["report.html", "report.md"]
    for path in written[1:]:
        assert (tmp_path / "b" / path.name).read_text() == path.read_text()
    page = (tmp_path / "a" / "report.html").read_text()
    assert all(f"var(--{name})" in page and f"--{name}: #" in page for name in CONTENDERS)
    assert page.count("<svg") == 4  # speed-ups and memory of all, times and speed-ups of one; no bytes, no roofline


def test_figure_stands_alone(saved, tmp_path, capsys):
    """An SVG file with the colours of both schemes and the times of every contender; none without training steps."""
    (path,), figure = saved(new=report()), tmp_path / "figure.svg"
    assert cli.main(["report", "--render", path, "--figure", str(figure)]) == 0
    texts = [node.text for node in ElementTree.parse(figure).iter("{http://www.w3.org/2000/svg}text")]
    assert {"se", "eca", "eager", "compile", "fused", "8.00", "4.00", "2.00"} <= set(texts)
    assert "prefers-color-scheme: dark" in figure.read_text()
    found = report()
    forward = dataclasses.replace(found, rows=[dataclasses.replace(r, mode="forward") for r in found.rows])
    (path,) = saved(forward=forward)
    assert cli.main(["report", "--render", path, "--figure", str(figure)]) == 2
    assert "--figure needs" in capsys.readouterr().err


def test_losses_name_faster_rivals_and_the_lowest_peak():
    """Failures come first."""
    found = report(tuple(CONTENDERS), ms=3.5, peak_bytes=15360)
    assert [(loss.ours, loss.rival, loss.what, round(loss.ratio, 2)) for loss in found.losses] == [
        ("fused", "compile-max-autotune", "time", 1.17),
        ("fused", "eager", "peak memory", 2.0),
    ]
    failed = report(failure="RuntimeError: no")
    assert [(loss.what, loss.failure) for loss in failed.losses] == [("failure", "RuntimeError: no")]
    assert json.loads(failed.to_json())["losses"][0]["ratio"] is None
