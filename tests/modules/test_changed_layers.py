"""Whatever is done to the layers of a fused module works as it does in the plain module, whose layers are called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import feature_map
from changes import CHANGES, assert_same_in_every_mode
from visattn_fast import catalogue

ENTRIES = {name: e for name, e in catalogue.ENTRIES.items() if e.training and list(e.pair(32)[1].children())}


@pytest.mark.parametrize("how", ["fused", "before", "after"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_changed_layers_count(entry, name, how):
    """``how``: the module is of the fused class, or is accelerated, before or after the change."""
    dtype = torch.float32 if name == "quantize_dynamic" else torch.float64
    fast, plain = entry.pair(32, dtype)
    x = feature_map((2, 32, 7, 6), "nchw", dtype)
    module = fast if how == "fused" else copy.deepcopy(plain)
    if how == "before":
        vf.accelerate(module)
    if not CHANGES[name](plain):
        pytest.skip("has no such layer")
    CHANGES[name](module)
    if how == "after":
        vf.accelerate(module)
    assert_same_in_every_mode(module, plain, x, name)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_the_plain_module_calls_every_layer(entry):
    """The twin of these tests is what everybody writes: each of its layers runs."""
    plain, seen = entry.pair(32)[1], set()
    layers = {n: m for n, m in plain.named_modules() if n and type(m) is not nn.ModuleList}
    for n, layer in layers.items():
        layer.register_forward_hook(lambda *_, n=n: seen.add(n))
    plain(feature_map((2, 32, 7, 6), "nchw", torch.float32))
    assert seen == layers.keys()
