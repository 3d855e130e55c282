"""``visattn-fast report``: measures, shows the table, writes JSON, Markdown and a page."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from ..backends import NAMES, select
from ..catalogue import ENTRIES, LAYOUTS, SHAPES
from . import markdown, page, terminal
from .cases import CONTENDERS, MODES, MODULES, QUICK_MODULES, Case, Shape, choose, matrix, parse_shape
from .machine import describe
from .measure import Row, measure
from .results import Report
from .timing import Effort

_FULL = Effort()
_QUICK = Effort(seconds=0.2, fewest=5, most=60)
_QUICK_BUDGET = 90.0  # seconds, after which no further case begins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    every = ",".join
    parser.add_argument("--quick", action="store_true", help="few modules and repetitions, what fits into two minutes")
    parser.add_argument("--out", default="report", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument(
        "--modules", help=f"of {every(ENTRIES)} (default: {every(MODULES)}; quick: {every(QUICK_MODULES)})"
    )
    parser.add_argument("--shapes", metavar="NxCxHxW,...", help="sizes (default: the catalogue's)")
    parser.add_argument("--layouts", default=every(LAYOUTS), help="default: %(default)s")
    parser.add_argument("--modes", default=every(MODES), help="default: %(default)s")
    parser.add_argument("--contenders", default=every(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--backend", default="auto", choices=("auto", *NAMES), help="of fused (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="that torch may use (default: torch's choice)")
    parser.add_argument("--seconds", type=float, metavar="S", help="to time each case for")


def run(args: argparse.Namespace) -> int:
    """Runs it. Returns 0, 1 where fused failed or was wrong, 2 for bad options."""
    try:
        device = torch.device(args.device)
        contenders = choose(args.contenders, tuple(CONTENDERS))
        cases = _plan(args)
        select(device.type, getattr(torch, args.dtype), args.backend)
    except (ValueError, RuntimeError) as error:
        print(f"visattn-fast report: {error}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    effort = _QUICK if args.quick else _FULL
    if args.seconds is not None:
        effort = Effort(args.seconds, effort.fewest, effort.most)
    out = terminal.console()
    start = time.perf_counter()
    rows, left_out = _measure(cases, device, effort, contenders, args, out)
    settings = {name: getattr(args, name) for name in ("quick", "backend", "dtype")} | {"contenders": contenders}
    report = Report(describe(device), settings, left_out, rows, time.perf_counter() - start)
    terminal.show(report, out)
    written = write(report, Path(args.out))
    out.print(f"wrote {', '.join(map(str, written))} in {report.seconds:.0f} s", highlight=False, soft_wrap=True)
    return int(any(row.contender == "fused" for row in report.failures))


def write(report: Report, folder: Path) -> list[Path]:
    """Writes ``report.json``, ``report.md`` and ``report.html`` into the folder, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.json": report.to_json(), "report.md": markdown.render(report), "report.html": page.render(report)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _plan(args: argparse.Namespace) -> list[Case]:
    """What is to be measured; of a quick run the largest sizes last, for which time may not be left."""
    shapes: tuple[Shape, ...] = tuple(sorted(SHAPES, key=math.prod)) if args.quick else SHAPES
    if args.shapes:
        shapes = tuple(parse_shape(text) for text in args.shapes.split(","))
    layouts, modes = choose(args.layouts, tuple(LAYOUTS)), choose(args.modes, tuple(MODES))
    modules = choose(args.modules, tuple(ENTRIES)) if args.modules else QUICK_MODULES if args.quick else MODULES
    return [c for c in matrix(modules, shapes, layouts, modes, args.dtype) if ENTRIES[c.op].takes(c.shape)]


def _measure(
    cases: list[Case],
    device: torch.device,
    effort: Effort,
    contenders: list[str],
    args: argparse.Namespace,
    out: terminal.Console,
) -> tuple[list[Row], list[str]]:
    """The rows, and what was left out, in words."""
    end = time.perf_counter() + (_QUICK_BUDGET if args.quick else float("inf"))
    rows: list[Row] = []
    late: list[str] = []
    for case in terminal.tracked(cases, out):
        if time.perf_counter() > end:
            late.append(f"{case.op} {case.size} {case.layout} {case.mode}")
        else:
            rows += measure(case, device, effort, contenders, args.backend).rows
    return rows, [f"{', '.join(late)}: the quick run's {_QUICK_BUDGET:.0f} s were over"] if late else []
