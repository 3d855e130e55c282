"""Whatever is done to the layers of a fused module works as it does in the plain module, whose layers are called."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import feature_map
from changes import CHANGES
from visattn_fast import catalogue

ENTRIES = {name: e for name, e in catalogue.ENTRIES.items() if e.training and list(e.pair(32)[1].children())}
INFERENCE = ("quantize_dynamic", "offloaded")  # without gradients
MODES = ("train", "eval", "no_grad")


def changed_run(module, x, mode):
    """Two calls, with the gradients of the second, and the buffers after them."""
    module.train(mode == "train")
    x = x.clone().requires_grad_(mode != "no_grad")
    with torch.set_grad_enabled(mode != "no_grad"):
        module(x)
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
    found = {"y": y.detach(), **{name: b.clone() for name, b in module.named_buffers() if isinstance(b, torch.Tensor)}}
    if mode != "no_grad":
        y.square().sum().backward()
        found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None} | {"x": x.grad}
    return found


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if expected.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(got[name], expected, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


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
    for mode in MODES[2:] if name in INFERENCE else MODES:
        try:
            want = changed_run(plain, x, mode)
        except RuntimeError as error:  # NAM itself reads a weight that is offloaded
            with pytest.raises(RuntimeError, match=re.escape(str(error))):
                changed_run(module, x, mode)
        else:
            assert_same(changed_run(module, x, mode), want)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_the_plain_module_calls_every_layer(entry):
    """The twin of these tests is what everybody writes: each of its layers runs."""
    plain, seen = entry.pair(32)[1], set()
    layers = {n: m for n, m in plain.named_modules() if n and type(m) is not nn.ModuleList}
    for n, layer in layers.items():
        layer.register_forward_hook(lambda *_, n=n: seen.add(n))
    plain(feature_map((2, 32, 7, 6), "nchw", torch.float32))
    assert seen == layers.keys()
