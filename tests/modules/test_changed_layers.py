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
from visattn_fast.reference import as_built

ENTRIES = {name: e for name, e in catalogue.ENTRIES.items() if e.main and list(e.pair(32)[1].children())}


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


@pytest.mark.parametrize("name", ["bias", "dilation", "padding_mode", "replaced_activation", "replaced_norm"])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_layers_changed_after_compilation_count(entry, name):
    """Compiled code notices the change: what it assumes of a layer is among its guards."""
    torch._dynamo.reset()
    fast, plain = (module.eval() for module in entry.pair(32, torch.float64))
    if not CHANGES[name](copy.deepcopy(plain)):
        pytest.skip("has no such layer")
    x = feature_map((2, 32, 7, 6), "nchw", torch.float64)
    compiled = torch.compile(fast, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x))
    for module in (fast, plain):
        CHANGES[name](module)
    torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_the_plain_module_calls_every_layer(entry):
    """The twin of these tests is what everybody writes: each of its layers runs."""
    plain, seen = entry.pair(32)[1], set()
    layers = {n: m for n, m in plain.named_modules() if n and type(m) is not nn.ModuleList}
    for n, layer in layers.items():
        layer.register_forward_hook(lambda *_, n=n: seen.add(n))
    plain(feature_map((2, 32, 7, 6), "nchw", torch.float32))
    assert seen == layers.keys()


native = pytest.mark.skipif(as_built._native is None, reason="the native library is not built")


@native
@pytest.mark.parametrize("name", [None, *CHANGES])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_native_check_agrees_with_the_one_in_python(entry, name):
    """It may only say yes where the one in Python does; to layers that nobody touched, both do."""
    module = entry.pair(32)[0]
    changed = CHANGES[name](module) if name else 0
    tables = [table for table in vars(type(module).__mro__[1]).values() if isinstance(table, as_built.Layers)]
    assert tables or entry.name in ("bam", "self_attention")
    for table in tables:
        found = as_built._native(module.__dict__, table, table.fits, as_built.PLAIN, as_built._GLOBAL_HOOKS)
        assert found == as_built._is_untouched(module, table)
        assert found or changed or entry.name == "triplet_attention"
