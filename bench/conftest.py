"""Options of the benchmarks."""

from __future__ import annotations

import pytest

from visattn_fast.catalogue import SHAPES

DEFAULT_SHAPES = (SHAPES[1], SHAPES[3])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="every size of the catalogue, not two of them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = SHAPES if metafunc.config.getoption("--all-shapes") else DEFAULT_SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda s: "x".join(map(str, s)))
