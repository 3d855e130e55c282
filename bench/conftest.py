"""Options of the benchmarks: those of ``visattn-fast report``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from visattn_fast.catalogue import SHAPES
from visattn_fast.measure.step import DEFAULT_MODES, MODES
from visattn_fast.report.cases import CONTENDERS, DEFAULT_CONTENDERS, DTYPES, choose

from .clock import DEVICE


def _own(names: Iterable[str]) -> tuple[str, ...]:
    """Without other libraries' modules: there are none for gates."""
    return tuple(name for name in names if not CONTENDERS[name].library)


DEFAULT_SHAPES = (SHAPES[1], SHAPES[3])
# Maps of 49 to 4096 positions, for attention over all of them.
SIZES = ((7, 7), (8, 8), (14, 14), (1, 197), (16, 16), (32, 32), (64, 64))
DEFAULT_SIZES = SIZES[2:3]
DEFAULT_DTYPE = "float32" if DEVICE.type == "cpu" else "bfloat16"
# Option: the argument of a benchmark, what there is of it, what is chosen.
OPTIONS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "--modes": ("mode", tuple(MODES), DEFAULT_MODES),
    "--contenders": ("gate_contender", _own(CONTENDERS), _own(DEFAULT_CONTENDERS)),
    "--dtypes": ("dtype", DTYPES, (DEFAULT_DTYPE,)),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="every size of the catalogue, not two of them")
    for option, (_, known, chosen) in OPTIONS.items():
        parser.addoption(option, default=",".join(chosen), help=f"of {', '.join(known)} (default: {','.join(chosen)})")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--all-shapes")
    sizes = {"shape": SHAPES if every else DEFAULT_SHAPES, "size": SIZES if every else DEFAULT_SIZES}
    for name, values in sizes.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda s: "x".join(map(str, s)))
    for option, (name, known, _) in OPTIONS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choose(metafunc.config.getoption(option), known))
