"""``visattn-fast report``: measures modules, or a whole model; shows the table, writes JSON, Markdown and a page."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..backends import NAMES, select
from ..catalogue import ENTRIES, LAYOUTS, SHAPES, feature_map
from . import markdown, page, terminal
from .cases import CONTENDERS, MODES, MODULES, QUICK_MODULES, Case, Shape, choose, matrix, parse_shape
from .machine import describe
from .measure import Row, measure
from .results import Report
from .timing import Effort
from .whole_model import WAYS, ModelReport, build, measure_model

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
    whole = parser.add_argument_group("a whole model, before and after accelerate", "instead of single modules")
    whole.add_argument("--model", metavar="SPEC", help="timm:NAME, torchvision:NAME or MODULE:FUNCTION")
    whole.add_argument("--options", default="{}", metavar="JSON", help="keywords of the function that builds it")
    whole.add_argument("--train", action="store_true", help="forward and backward; else inference")
    whole.add_argument("--batch", type=int, default=8, metavar="N", help="images (default: %(default)s)")
    whole.add_argument("--size", type=int, default=224, metavar="N", help="of their sides (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Runs it. Returns 0, 1 where fused failed or was wrong, 2 for bad options."""
    if args.model:
        return _run_model(args)
    try:
        device = torch.device(args.device)
        contenders = choose(args.contenders, tuple(CONTENDERS))
        cases = _plan(args)
        select(device.type, getattr(torch, args.dtype), args.backend)
    except (ValueError, RuntimeError) as error:
        print(f"visattn-fast report: {error}", file=sys.stderr)
        return 2
    effort, out = _prepare(args), terminal.console()
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
    return _write(folder, "report", report.to_json(), markdown.render(report), page.render(report))


def _write(folder: Path, name: str, *texts: str) -> list[Path]:
    """JSON, Markdown and, if there is one, a page."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}{ending}": text for ending, text in zip((".json", ".md", ".html"), texts, strict=False)}
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return list(files)


def _run_model(args: argparse.Namespace) -> int:
    """Measures a whole model. Returns 0, or 2 for bad options."""
    effort, out, start = _prepare(args), terminal.console(), time.perf_counter()
    settings = {name: getattr(args, name) for name in ("model", "options", "train", "batch", "size", "dtype")}
    try:
        device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        ways = tuple(way for way in WAYS if way in choose(args.contenders, tuple(CONTENDERS)))
        model = build(args.model, _keywords(args.options))
        shape = (args.batch, 3, args.size, args.size)
        if min(shape) < 1:
            raise ValueError(f"--batch and --size must be positive, got {args.batch} and {args.size}")
        for layout in choose(args.layouts, tuple(LAYOUTS)):
            x = feature_map(shape, layout, dtype, device)
            # torch's stubs know no memory_format
            model = model.to(x).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
            found, rows = measure_model(model, x, args.train, effort, ways, args.backend)
            seconds = time.perf_counter() - start
            report = ModelReport(describe(device), settings | {"layout": layout}, found, rows, seconds)
            terminal.show_model(report, out)
            written = _write(Path(args.out), f"model-{layout}", report.to_json(), markdown.render_model(report))
            out.print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    except (ValueError, RuntimeError) as error:
        print(f"visattn-fast report: {error}", file=sys.stderr)
        return 2
    return 0


def _keywords(text: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError on anything else."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"--options must be a JSON object, got {text}")
    return found


def _prepare(args: argparse.Namespace) -> Effort:
    """Sets the threads, and returns how long to measure."""
    if args.threads:
        torch.set_num_threads(args.threads)
    effort = _QUICK if args.quick else _FULL
    return effort if args.seconds is None else Effort(args.seconds, effort.fewest, effort.most)


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
