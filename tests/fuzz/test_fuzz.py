"""Some hundreds of random cases; `make fuzz` runs thousands. Cases that once failed are listed and run first."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing import Case, cases, check_accelerated, check_module, check_raw
from known_modules import MODULES
from visattn_fast import catalogue
from visattn_fast.ops.library import OPS

pytestmark = pytest.mark.filterwarnings("ignore")
quick = settings(
    max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
FAILED = [
    Case("self_attention", (2, 8, 4, 5), hooks="spread"),
    Case("self_attention", (1, 16, 3, 3), strides="reversed", hooks="spread"),
    Case("triplet_attention", (1, 8, 8, 1), strides="nhwc", hooks="spread"),
    Case("triplet_attention", (1, 1, 8, 8), strides="reversed", hooks="spread"),
    Case("coord_att", (2, 4, 4, 24), strides="sliced", values="inf", activation="silu"),
    Case("torchvision SqueezeExcitation of MobileNetV3", (2, 32, 2, 2), values="nan"),
    Case("local_attention", (1, 21, 21, 21), strides="gaps", values="shifted", activation="silu", gradient="nhwc"),
]


@pytest.mark.parametrize("name", catalogue.ENTRIES)
@quick
@given(st.data())
def test_modules(name, data):
    check_module(data.draw(cases([name])))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in catalogue.ENTRIES])
@settings(quick, max_examples=2)
@given(st.data())
def test_accelerated(name, data):
    check_accelerated(data.draw(cases([name], st.just(32))))


@pytest.mark.parametrize("name", OPS)
@settings(quick, max_examples=3)
@given(st.integers(0, 1 << 30))
def test_raw_ops(name, seed):
    check_raw(name, seed)


@pytest.mark.parametrize(("name", "seed"), [("se_bwd", 23), ("attention_fwd", 247914)])
def test_raw_calls_that_once_failed(name, seed):
    check_raw(name, seed)


@pytest.mark.parametrize("case", FAILED, ids=str)
def test_cases_that_once_failed(case):
    (check_module if case.name in catalogue.ENTRIES else check_accelerated)(case)
