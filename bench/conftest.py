"""Options of the benchmarks."""

from __future__ import annotations

import pytest

from visattn_fast.catalogue import SHAPES

DEFAULT_SHAPES = (SHAPES[1], SHAPES[3])
# Maps of 49 to 4096 positions, for attention over all of them.
SIZES = ((7, 7), (8, 8), (14, 14), (1, 197), (16, 16), (32, 32), (64, 64))
DEFAULT_SIZES = SIZES[2:3]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="every size of the catalogue, not two of them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = SHAPES if metafunc.config.getoption("--all-shapes") else DEFAULT_SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda s: "x".join(map(str, s)))
    if "size" in metafunc.fixturenames:
        sizes = SIZES if metafunc.config.getoption("--all-shapes") else DEFAULT_SIZES
        metafunc.parametrize("size", sizes, ids=lambda s: "x".join(map(str, s)))
