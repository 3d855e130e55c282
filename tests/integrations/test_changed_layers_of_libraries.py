"""Whatever is done to the layers of an accelerated module works as it does in the library's own module."""

from __future__ import annotations

import copy

import pytest
import torch

import visattn_fast as vf
from changes import CHANGES, assert_same_in_every_mode
from known_modules import MODULES, C
from visattn_fast import catalogue

NAMES = [name for name in MODULES if name not in catalogue.ENTRIES]  # those are in tests/modules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("module", NAMES)
def test_changed_layers_count(module, name, before):
    """``before``: the module is accelerated before the change, else after it."""
    torch.manual_seed(0)
    dtype = torch.float32 if name == "quantize_dynamic" else torch.float64
    plain = MODULES[module]().to(dtype)
    fast = copy.deepcopy(plain)
    if before:
        vf.accelerate(fast)
    if not CHANGES[name](plain):
        pytest.skip("has no such layer")
    CHANGES[name](fast)
    if not before:
        vf.accelerate(fast)
    assert_same_in_every_mode(fast, plain, catalogue.feature_map((2, C, 7, 6), "nchw", dtype=dtype), name)
