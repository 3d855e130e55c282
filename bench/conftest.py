"""Options of the benchmarks, the same as those of ``visattn-fast report``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from visattn_fast.catalogue import SHAPES
from visattn_fast.measure.step import DEFAULT_MODES, MODES
from visattn_fast.report.cases import CONTENDERS, DEFAULT_CONTENDERS, DTYPES, choose

from .clock import DEVICE


def _without_libraries(names: Iterable[str]) -> tuple[str, ...]:
    """Drops contenders from other libraries, which have no module for gates."""
    return tuple(name for name in names if not CONTENDERS[name].library)


DEFAULT_SHAPES = (SHAPES[1], SHAPES[3])
# Maps of 49 to 4096 positions, for attention over all positions.
SIZES = ((7, 7), (8, 8), (14, 14), (1, 197), (16, 16), (32, 32), (64, 64))
DEFAULT_SIZES = SIZES[2:3]
DEFAULT_DTYPE = "float32" if DEVICE.type == "cpu" else "bfloat16"
# Option -> the benchmarks' argument, its known values, its default values.
OPTIONS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "--modes": ("mode", tuple(MODES), DEFAULT_MODES),
    "--contenders": ("gate_contender", _without_libraries(CONTENDERS), _without_libraries(DEFAULT_CONTENDERS)),
    "--dtypes": ("dtype", DTYPES, (DEFAULT_DTYPE,)),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="all sizes of the catalogue instead of two")
    for option, (_, known, defaults) in OPTIONS.items():
        default = ",".join(defaults)
        parser.addoption(option, default=default, help=f"some of {', '.join(known)} (default: {default})")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    all_shapes = metafunc.config.getoption("--all-shapes")
    sizes = {"shape": SHAPES if all_shapes else DEFAULT_SHAPES, "size": SIZES if all_shapes else DEFAULT_SIZES}
    for name, values in sizes.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=lambda s: "x".join(map(str, s)))
    for option, (name, known, _) in OPTIONS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, choose(metafunc.config.getoption(option), known))
