"""``visattn-fast report``: measures modules or a whole model, renders a saved report again, or compares two reports."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..backends import NAMES, select
from ..catalogue import ENTRIES, LAYOUTS, SHAPES, feature_map
from ..measure.step import DEFAULT_MODES, MODES
from ..measure.timing import Effort
from . import bars, html, markdown, page, terminal
from .cases import CONTENDERS, DEFAULT_CONTENDERS, DTYPES, MODULES, QUICK_MODULES, Case, choose, matrix, parse_shape
from .compare import compare
from .machine import describe
from .places import make_writable
from .results import Report, read
from .rows import Row, first_line, measure
from .whole_model import WAYS, ModelReport, build, measure_model

_FULL = Effort()
_QUICK = Effort(seconds=0.2, fewest=5, most=60)
_QUICK_BUDGET = 90.0  # seconds after which no further case begins
_INTERRUPTED = 130  # as `cli.main` returns
_NO_FIGURE = "--figure needs a report of modules in mode both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    every = ",".join

    def listed(name: str, about: str, known: tuple[str, ...], chosen: tuple[str, ...], *aliases: str) -> None:
        rest = [n for n in known if n not in chosen]
        also = f"; also {every(rest)}, or all" if rest else ""
        parser.add_argument(name, *aliases, default=every(chosen), help=f"{about} (default: %(default)s{also})")

    parser.add_argument("--quick", action="store_true", help="few modules and rounds, to fit into two minutes")
    parser.add_argument("--out", metavar="DIR", help="folder to write into (default: report)")
    parser.add_argument(
        "--modules", help=f"some of {every(ENTRIES)} (default: {every(MODULES)}; quick: {every(QUICK_MODULES)})"
    )
    parser.add_argument("--shapes", metavar="NxCxHxW,...", help="sizes of x (default: the catalogue's)")
    listed("--layouts", "memory formats of x", tuple(LAYOUTS), tuple(LAYOUTS))
    listed("--modes", "modes to time", tuple(MODES), DEFAULT_MODES)
    listed("--contenders", "ways to run a module", tuple(CONTENDERS), DEFAULT_CONTENDERS)
    listed("--dtypes", "dtypes of x and parameters", DTYPES, DTYPES[:1], "--dtype")
    parser.add_argument("--cold", action="store_true", help="compile without torch's caches on disk")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="device to measure on (default: %(default)s)")
    parser.add_argument("--backend", default="auto", choices=("auto", *NAMES), help="backend of fused (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that torch may use (default: torch's choice)")
    parser.add_argument("--seconds", type=float, metavar="S", help="seconds to time each case for")
    parser.add_argument("--figure", metavar="SVG", help="also draw the mean times of training steps (mode both)")
    whole = parser.add_argument_group("a whole model before and after accelerate, instead of single modules")
    whole.add_argument("--model", metavar="SPEC", help="timm:NAME, torchvision:NAME or MODULE:FUNCTION")
    whole.add_argument("--options", default="{}", metavar="JSON", help="keyword arguments to build the model with")
    whole.add_argument("--train", action="store_true", help="time forward and backward (default: inference)")
    whole.add_argument("--batch", type=int, default=8, metavar="N", help="images per batch (default: %(default)s)")
    whole.add_argument("--size", type=int, default=224, metavar="N", help="pixels of a side (default: %(default)s)")
    done = parser.add_argument_group("saved reports, instead of measuring")
    done.add_argument("--render", metavar="JSON", help="write Markdown and HTML again, beside the file or into --out")
    done.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="list the changes of fused in two report.json")
    done.add_argument("--threshold", type=float, default=1.1, metavar="X", help="growth allowed (default: %(default)s)")
    done.add_argument("--in-copies", action="store_true", help="compare times in multiples of each report's own copy")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns 0; 1 if fused failed, was wrong or became worse; 2 for bad options and files; 130 for a report that an
    interrupt cut short.
    """
    action = _compare if args.compare else _render if args.render else _run_model if args.model else _run_modules
    try:
        return action(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"visattn-fast report: {error}", file=sys.stderr)
        return 2


def _run_modules(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    contenders, dtypes = choose(args.contenders, tuple(CONTENDERS)), choose(args.dtypes, DTYPES)
    cases = _plan(args, dtypes)
    for dtype in dtypes:
        select(device.type, getattr(torch, dtype), args.backend)
    folder = _places(args, drawable=any(case.mode == "both" for case in cases))
    effort, out = _prepare(args), terminal.console()
    start = time.perf_counter()
    rows, left_out, interrupted = _measure(cases, device, effort, contenders, args, out)
    settings = {"quick": args.quick, "backend": args.backend, "dtypes": dtypes, "contenders": contenders}
    settings |= {"cold": args.cold}
    report = Report(describe(device), settings, left_out, rows, time.perf_counter() - start)
    terminal.show(report, out)
    written = write(report, folder) + _draw(report, args)
    out.print(f"wrote {', '.join(map(str, written))} in {report.seconds:.0f} s", highlight=False, soft_wrap=True)
    return _INTERRUPTED if interrupted else int(any(CONTENDERS[row.contender].fused for row in report.failures))


def _places(args: argparse.Namespace, drawable: bool) -> Path:
    """Makes the folder of the report, before anything is measured. Returns the folder.

    Raises:
        ValueError: the report or its figure cannot be written there, or the figure has nothing to show.
    """
    if args.figure and not drawable:
        raise ValueError(_NO_FIGURE)
    folder = Path(args.out or "report")
    make_writable(folder, "--out")
    if args.figure:
        make_writable(Path(args.figure).parent, "--figure")
    return folder


def write(report: Report | ModelReport, folder: Path, name: str = "report") -> list[Path]:
    """Writes ``report.json``, ``report.md`` and ``report.html`` into the folder. Returns their paths."""
    return _write(folder, name, {".json": report.to_json()} | _rendered(report))


def _rendered(report: Report | ModelReport) -> dict[str, str]:
    if isinstance(report, ModelReport):
        return {".md": markdown.render_model(report), ".html": page.render_model(report)}
    return {".md": markdown.render(report), ".html": page.render(report)}


def _draw(report: Report | ModelReport, args: argparse.Namespace) -> list[Path]:
    """Draws the figure that was asked for. Returns its path. Raises ValueError if no training steps were measured."""
    if not args.figure:
        return []
    svg = bars.mean_times(report, "both") if isinstance(report, Report) else ""
    if not svg:
        raise ValueError(_NO_FIGURE)
    path = Path(args.figure)
    path.write_text(html.drawing(svg), encoding="utf-8")
    return [path]


def _write(folder: Path, name: str, texts: dict[str, str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}{ending}": text for ending, text in texts.items()}
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return list(files)


def _render(args: argparse.Namespace) -> int:
    """Renders Markdown and HTML again from the JSON of a report."""
    path = Path(args.render)
    data = read(path)
    report = ModelReport.parse(data, path) if "accelerated" in data else Report.parse(data, path)
    written = _write(Path(args.out) if args.out else path.parent, path.stem, _rendered(report)) + _draw(report, args)
    terminal.console().print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return 0


def _compare(args: argparse.Namespace) -> int:
    """Shows what changed. Returns 1 if a figure of fused grew past the threshold."""
    if not args.threshold >= 1:
        raise ValueError(f"--threshold must be at least 1, got {args.threshold:g}")
    old, new = map(Report.load, args.compare)
    found = compare(old, new, args.threshold, args.in_copies)
    terminal.show_comparison(found, terminal.console())
    return int(bool(found.regressions))


def _run_model(args: argparse.Namespace) -> int:
    """Measures a whole model and writes its report."""
    effort, out, start = _prepare(args), terminal.console(), time.perf_counter()
    settings = {name: getattr(args, name) for name in ("model", "options", "train", "batch", "size")}
    name, *more = choose(args.dtypes, DTYPES)
    if more:
        raise ValueError(f"--model takes one dtype, got {args.dtypes}")
    device, dtype = torch.device(args.device), getattr(torch, name)
    ways = tuple(way for way in WAYS if way in choose(args.contenders, tuple(CONTENDERS)))
    model = build(args.model, _keywords(args.options))
    shape = (args.batch, 3, args.size, args.size)
    if min(shape) < 1:
        raise ValueError(f"--batch and --size must be positive, got {args.batch} and {args.size}")
    folder = _places(args, drawable=False)
    for layout in choose(args.layouts, tuple(LAYOUTS)):
        x = feature_map(shape, layout, dtype, device)
        # torch's stubs lack memory_format
        model = model.to(x).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        found, rows = measure_model(model, x, args.train, effort, ways, args.backend)
        seconds = time.perf_counter() - start
        report = ModelReport(describe(device), settings | {"dtype": name, "layout": layout}, found, rows, seconds)
        terminal.show_model(report, out)
        written = write(report, folder, f"model-{layout}")
        out.print(f"wrote {', '.join(map(str, written))}", highlight=False, soft_wrap=True)
    return 0


def _keywords(text: str) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"--options must be a JSON object, got {text}")
    return found


def _prepare(args: argparse.Namespace) -> Effort:
    """Sets the number of threads. Returns how long to measure."""
    if args.threads:
        torch.set_num_threads(args.threads)
    effort = _QUICK if args.quick else _FULL
    return effort if args.seconds is None else Effort(args.seconds, effort.fewest, effort.most)


def _plan(args: argparse.Namespace, dtypes: list[str]) -> list[Case]:
    """Lists the cases to measure; a quick run has the largest sizes last, because its time may run out."""
    given = tuple(parse_shape(text) for text in args.shapes.split(",")) if args.shapes else ()
    layouts, modes = choose(args.layouts, tuple(LAYOUTS)), choose(args.modes, tuple(MODES))
    modules = choose(args.modules, tuple(ENTRIES)) if args.modules else QUICK_MODULES if args.quick else MODULES
    sizes = {name: given or ENTRIES[name].shapes or SHAPES for name in modules}
    every = list(dict.fromkeys(shape for own in sizes.values() for shape in own))
    if args.quick and not given:
        every.sort(key=math.prod)
    cases = matrix(modules, every, layouts, modes, dtypes)
    return [c for c in cases if c.shape in sizes[c.op] and ENTRIES[c.op].supports(c.shape)]


def _measure(
    cases: list[Case],
    device: torch.device,
    effort: Effort,
    contenders: list[str],
    args: argparse.Namespace,
    out: Console,
) -> tuple[list[Row], list[str], bool]:
    """Measures the cases until an interrupt; a case whose rivals fail is left out.

    Returns the rows, sentences on the cases left out, and True after an interrupt.

    Raises:
        RuntimeError: no case could be measured.
        KeyboardInterrupt: an interrupt before the first row.
    """
    end = time.perf_counter() + (_QUICK_BUDGET if args.quick else float("inf"))
    rows: list[Row] = []
    late: list[str] = []
    failed: list[str] = []
    interrupted: list[str] = []
    for index, case in enumerate(terminal.tracked(cases, out)):
        if time.perf_counter() > end:
            late.append(str(case))
            continue
        try:
            rows += measure(case, device, effort, contenders, args.backend, args.cold).rows
        except (RuntimeError, MemoryError) as error:  # the rivals themselves may be out of memory
            failed.append(f"{case}: {first_line(error)}")
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = [f"{len(cases) - index} cases from {case} on: the run was interrupted"]
            break
    if failed and not rows:
        raise RuntimeError(f"no case could be measured; {failed[0]}")
    left_out = [f"{', '.join(late)}: the quick run's {_QUICK_BUDGET:.0f} s were over"] if late else []
    return rows, left_out + failed + interrupted, bool(interrupted)
