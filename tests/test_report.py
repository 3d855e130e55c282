"""The comparison report: what it measures, and that its three forms say the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from cases import INTERPRETED

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from visattn_fast import cli
from visattn_fast.report import markdown, page
from visattn_fast.report.results import Report

pytestmark = pytest.mark.skipif(INTERPRETED, reason="times kernels, which the interpreter does not")
TINY = ("--quick", "--shapes", "2x16x6x5", "--seconds", "0")


def report(out, *options: str) -> Report:
    assert cli.main(["report", *TINY, "--out", str(out), *options]) == 0
    return Report.load(out / "report.json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every module and mode in one layout, eager against fused."""
    out = tmp_path_factory.mktemp("report")
    return out, report(out, "--contenders", "eager,fused", "--layouts", "channels_last")


def test_rows(measured):
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


def test_memory(measured):
    """Fused CBAM keeps x and small maps where eager keeps copies of x."""
    saved = {r.contender: r.saved_x for r in measured[1].rows if (r.op, r.mode) == ("cbam", "both")}
    assert saved["eager"] > saved["fused"]


def test_speedups_are_ratios_of_medians(measured):
    for comparison in measured[1].comparisons:
        ratio = comparison.rows["eager"].p50_ms / comparison.rows["fused"].p50_ms
        assert comparison.speedup("eager") == pytest.approx(ratio)
        assert any(loss.case == comparison.case for loss in measured[1].losses) == (ratio < 1)


def test_losses_are_shown(measured):
    """A slow row is listed in every form of the report, as a loss."""
    out, found = measured
    data = json.loads((out / "report.json").read_text())
    for row in data["rows"]:
        if row["contender"] == "fused":
            row["p20_ms"] = row["p50_ms"] = row["p80_ms"] = 1e3
    slow = out / "slow.json"
    slow.write_text(json.dumps(data))
    slow_report = Report.load(slow)
    assert len(slow_report.losses) == len(found.comparisons)
    for text in (markdown.render(slow_report), page.render(slow_report)):
        for loss in slow_report.losses:
            assert str(loss) in text


def test_markdown(measured):
    out, found = measured
    text = (out / "report.md").read_text()
    assert text == markdown.render(found)
    for comparison in found.comparisons:
        assert f"{comparison.speedup('eager'):.2f}x" in text


def test_page_is_whole_and_self_contained(measured):
    """Balanced tags, one picture per module at least, nothing fetched from elsewhere, light and dark."""
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


def test_a_contender_that_fails_gets_a_row(tmp_path):
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
def test_bad_options(options, message, capsys, tmp_path):
    assert cli.main(["report", "--out", str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
