"""The comparison report: its rows, its three forms, bad options, and whole models."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from visattn_fast import cli
from visattn_fast.measure.timing import Effort
from visattn_fast.report import command, markdown, page, whole_model
from visattn_fast.report.results import Report

TINY = ("--quick", "--shapes", "2x16x6x5", "--seconds", "0")


def report(out, *options: str) -> Report:
    assert cli.main(["report", *TINY, "--out", str(out), *options]) == 0
    return Report.load(out / "report.json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measures every quick module and mode in one layout, eager and fused."""
    out = tmp_path_factory.mktemp("report")
    return out, report(out, "--contenders", "eager,fused", "--layouts", "channels_last")


def test_rows_hold_times_memory_and_errors(measured):
    _, found = measured
    assert {(r.op, r.mode, r.contender) for r in found.rows} == {
        (op, mode, c)
        for op in ("se", "eca", "cbam")
        for mode in ("forward", "both")
        for c in ("copy", "eager", "fused")
    }
    for row in found.rows:
        assert not row.failure
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.rounds >= 5
        assert row.x_bytes == 2 * 16 * 6 * 5 * 4
        if row.contender == "fused":
            assert row.backend == "cpp"
            assert row.error < 1e-5
    assert found.machine.threads >= 1


def test_fused_keeps_less_memory_than_eager(measured):
    """Fused CBAM keeps x and small maps; eager keeps copies of x."""
    saved = {r.contender: r.saved_x for r in measured[1].rows if (r.op, r.mode) == ("cbam", "both")}
    assert saved["eager"] > saved["fused"]


def test_speedups_are_ratios_of_medians(measured):
    for comparison in measured[1].comparisons:
        ratio = comparison.rows["eager"].p50_ms / comparison.rows["fused"].p50_ms
        assert comparison.speedup("eager") == pytest.approx(ratio)
        slower = {loss.case for loss in measured[1].losses if loss.what == "time"}
        assert (comparison.case in slower) == (ratio < 1)


def test_losses_are_shown_in_every_form(measured):
    out, found = measured
    data = json.loads((out / "report.json").read_text())
    for row in data["rows"]:
        if row["contender"] == "fused":
            row["p20_ms"] = row["p50_ms"] = row["p80_ms"] = 1e3
    slow = out / "slow.json"
    slow.write_text(json.dumps(data))
    slow_report = Report.load(slow)
    slow_report = dataclasses.replace(slow_report, rows=[row for row in slow_report.rows if row.op == "se"])
    losses = [loss for loss in slow_report.losses if loss.what == "time"]
    assert len(losses) == len(found.of("se"))
    for text in (markdown.render(slow_report), page.render(slow_report)):
        assert "Where we lose" in text
        assert all(f"{loss.ratio:.2f}x" in text for loss in losses)


def test_markdown_shows_every_speedup(measured):
    out, found = measured
    text = (out / "report.md").read_text()
    assert text == markdown.render(found)
    for comparison in found.comparisons:
        assert f"{comparison.speedup('eager'):.2f}x" in text


def test_page_is_whole_and_self_contained(measured):
    """Tags are balanced, each module has a picture, nothing is fetched from elsewhere, light and dark mode work."""
    text = (measured[0] / "report.html").read_text()
    open_tags: list[str] = []

    class Balance(HTMLParser):
        void = frozenset({"meta", "link", "br", "img", "hr", "input"})

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Balance().feed(text)
    assert not open_tags
    assert text.count("<svg") + text.count("data:image/png") >= 3
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)
    assert "prefers-color-scheme" in text
    assert "viewport" in text


def test_failed_contender_gets_a_row(tmp_path):
    """Without a C++ compiler torch.compile cannot serve the CPU; the report says so and goes on."""
    code = (
        "import sys\nfrom visattn_fast import cli\n"
        f"options = [*{TINY!r}, '--modules', 'se', '--modes', 'forward', '--out', {str(tmp_path)!r}]\n"
        "sys.exit(cli.main(['report', *options]))"
    )
    environment = os.environ | {
        "CXX": "/nonexistent/compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {(r.contender, r.layout): r for r in Report.load(tmp_path / "report.json").rows}
    assert rows["compile", "nchw"].failure
    assert not rows["fused", "nchw"].failure
    assert "compile: " in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modules", "senet"], "unknown 'senet'; known are se, eca, "),
        (["--shapes", "8x64"], "a shape is four positive sizes, such as 8x64x112x112, got '8x64'"),
        (["--backend", "cuda"], "backend 'cuda' cannot serve torch.float32 on cpu"),
    ],
)
def test_bad_options_are_explained(options, message, capsys, tmp_path):
    assert cli.main(["report", "--out", str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_place_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(command, "measure_model", lambda *args: pytest.fail("measured"))
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "report")
    new = str(tmp_path / "new")
    for options, name in (
        (["report", "--out", inside], "--out"),
        (["report", "--out", new, "--figure", f"{inside}/figure.svg"], "--figure"),
        ([*MODEL, *SMALL, "--out", inside], "--out"),
        ([*MODEL, *SMALL, "--out", new, "--figure", "figure.svg"], "--figure"),
        (["report", "--out", new, "--figure", "figure.svg", "--modes", "forward"], "--figure"),
    ):
        assert cli.main(options) == 2
        assert f"report: {name}" in capsys.readouterr().err


def test_interrupted_report_holds_what_was_measured(tmp_path, monkeypatch, capsys):
    """And says what is missing. An interrupt before the first case leaves no report."""
    calls, measure = [], command.measure

    def interrupted(*args):
        calls.append(args)
        if len(calls) in (3, 4):
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(command, "measure", interrupted)
    options = ["report", *TINY, "--contenders", "eager,fused", "--modes", "forward"]
    assert cli.main([*options, "--out", str(tmp_path / "a")]) == 130
    found = Report.load(tmp_path / "a" / "report.json")
    assert len({row.case for row in found.rows}) == 2
    assert found.left_out == ["4 cases from eca 2x16x6x5 float32 nchw forward on: the run was interrupted"]
    assert found.left_out[0] in (tmp_path / "a" / "report.md").read_text()
    capsys.readouterr()
    assert cli.main([*options, "--out", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "visattn-fast report: interrupted\n"
    assert not list((tmp_path / "b").iterdir())


def test_case_that_memory_does_not_hold_is_left_out(tmp_path, monkeypatch, capsys):
    calls, measure = [], command.measure

    def full(*args):
        calls.append(args)
        if len(calls) != 2:
            raise RuntimeError("can't allocate memory\nmore")
        return measure(*args)

    monkeypatch.setattr(command, "measure", full)
    options = ["--contenders", "eager,fused", "--modes", "forward", "--modules", "se"]
    found = report(tmp_path, *options)
    assert len(found.rows) == 3
    assert len(found.left_out) == 1
    assert found.left_out[0].endswith("can't allocate memory")
    assert cli.main(["report", *TINY, *options, "--out", str(tmp_path)]) == 2
    assert "no case could be measured" in capsys.readouterr().err


MODEL = (
    "report",
    "--model",
    "visattn_fast.models:AttentionResNet",
    "--quick",
    "--seconds",
    "0",
    "--contenders",
    "eager",
)
SMALL = ("--batch", "2", "--size", "16", "--layouts", "nchw")


@pytest.mark.parametrize("mode", [(), ("--train",)], ids=["inference", "training"])
def test_whole_model_has_three_variants(tmp_path, capsys, mode):
    """As it is, accelerated, and without attention; rendered again, the report is the same."""
    options = ("--options", '{"attention": "cbam", "fused": false, "width": 8}')
    assert cli.main([*MODEL, *SMALL, *mode, *options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "model-nchw.json").read_text())
    assert {(row["variant"], row["way"]) for row in found["rows"]} == {(v, "eager") for v in whole_model.VARIANTS}
    assert all(0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in found["rows"])
    assert all(row["peak_bytes"] > 0 for row in found["rows"])
    text = (tmp_path / "model-nchw.md").read_text()
    assert all(f"| {name} | eager |" in text for name in whole_model.VARIANTS.values())
    assert "stages.0.0.gate" in found["accelerated"]
    assert found["settings"]["train"] is bool(mode)
    assert "images/s" in capsys.readouterr().out
    page = (tmp_path / "model-nchw.html").read_text()
    assert all(name in page for name in whole_model.VARIANTS.values())
    assert cli.main(["report", "--render", str(tmp_path / "model-nchw.json"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model-nchw.html").read_text() == page
    assert (tmp_path / "again" / "model-nchw.md").read_text() == text


def test_attention_tax_is_a_share_of_the_time():
    """Attention takes 4 of 10 ms; accelerate removes 3 of these 4."""
    rows = [
        whole_model.ModelRow(variant, "eager", 5, ms, ms, ms, None, None)
        for variant, ms in (("without", 6.0), ("before", 10.0), ("after", 7.0))
    ]
    report = whole_model.ModelReport(None, {}, "", rows)
    assert report.tax("eager") == (0.4, 0.75)
    assert report.tax("compile") is None
    assert report.verdicts() == ["eager: attention costs 40.0% of the time; accelerate removes 75% of that"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "resnet50"), "a model is timm:NAME, torchvision:NAME or MODULE:FUNCTION, got 'resnet50'"),
        (("--model", "no_such_module:f"), "no_such_module:f cannot be built"),
        (("--model", "builtins:int"), "builtins:int must be a torch.nn.Module, got int"),
        (("--options", "[1]"), "--options must be a JSON object"),
        (("--options", '{"attention": "none"}'), "AttentionResNet"),
        (("--dtypes", "float32,bfloat16"), "--model takes one dtype, got float32,bfloat16"),
        (("--batch", "0"), "--batch and --size must be positive, got 0 and 16"),
    ],
)
def test_bad_options_of_a_whole_model_are_explained(tmp_path, capsys, options, message):
    assert cli.main([*MODEL, *SMALL, *options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_model_without_attention_is_refused():
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    assert whole_model.without_attention(model) is None
    with pytest.raises(ValueError, match="the model has no attention module that accelerate knows"):
        whole_model.measure_model(model, x, False, Effort(0, 5, 5))
