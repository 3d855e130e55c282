"""Known modules of every library: swapped, they give the original's numbers; what cannot be served is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from blocks import block, swin
from cases import run
from known_modules import MODULES, C, spread_statistics, timm
from outside import library
from visattn_fast import catalogue
from visattn_fast.catalogue import feature_map

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_swapped_module_gives_the_originals_numbers(name, training, layout):
    """Result, gradients and running statistics; restored, it has its own class."""
    module = MODULES[name]().double().train(training)
    kind, x = type(module), feature_map((2, C, 7, 6), layout, dtype=torch.float64)
    if not training:
        spread_statistics(module)
    want = run(copy.deepcopy(module), x)
    found = vf.accelerate(module)
    assert [(s.name, s.kind) for s in found.swapped] == [("", kind.__name__)]
    assert isinstance(module, kind)
    assert type(module) is not kind
    got = run(copy.deepcopy(module), x)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    assert vf.restore(module) == 1
    assert type(module) is kind
    assert all(torch.equal(run(module, x)[key], tensor) for key, tensor in want.items() if key in ("y", "x"))


# A module that cannot be served -> how its reason begins.
UNSERVED = {
    "timm max pooling": (lambda: timm("SEModule", C, add_maxpool=True), "add_maxpool"),
    "timm GatherExcite, windows": (
        lambda: timm("GatherExcite", C, extent=2, use_mlp=False),
        "it gathers by windows, convolutions or maxima",
    ),
    "timm Swin, dropout": (
        lambda: timm("SwinTransformerBlock", C, (7, 7), 2, attn_drop=0.1, module="timm.models.swin_transformer"),
        "attn.attn_drop is not set to zero",
    ),
    "torchvision Swin, dropout": (
        lambda: library("torchvision.models.swin_transformer").ShiftedWindowAttention(
            C, [7, 7], [3, 3], 2, dropout=0.1
        ),
        "attention_dropout or dropout",
    ),
    "timm GlobalContext as it comes": (lambda: timm("GlobalContext", C), "use_attn or fuse_add"),
    "timm GlobalContext, added": (
        lambda: timm("GlobalContext", C, use_attn=False, fuse_add=True),
        "use_attn or fuse_add",
    ),
    "timm CoordAttn, ReLU": (
        lambda: timm("CoordAttn", C, act_layer=nn.ReLU, module="timm.layers.coord_attn"),
        "act is ReLU",
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_module_is_left_alone(name):
    build, reason = UNSERVED[name]
    module = build()
    kind = type(module)
    found = vf.accelerate(module)
    assert type(module) is kind
    assert not found.swapped
    assert found.skipped[0].reason.startswith(reason), found.skipped[0].reason


def test_swin_block_serves_the_size_of_its_mask():
    """For a map of another size timm's own code serves, and complains."""
    swin = library("timm.models.swin_transformer")
    x = feature_map((1, 10, 12, C))
    for dynamic, size in ((True, (7, 20)), (False, (12, 13))):
        block = swin.SwinTransformerBlock(C, size, 2, window_size=7, shift_size=3, dynamic_mask=dynamic)
        want = block(x)
        assert vf.accelerate(block).swapped
        torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)
    block = swin.SwinTransformerBlock(C, (7, 20), 2, window_size=7, shift_size=3)
    vf.accelerate(block)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        block(x)


def _attribute(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module.get_submodule(path), name, value)


def _second_layer(module: nn.Module) -> None:
    module.act, module.conv2 = nn.ReLU(), lambda y: 0.5 * y


def _halved(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


# Where a module may drop something -> the module, and the change that makes it drop, or scale, everything there.
DROPPED = {
    "timm Swin, attn_drop": (lambda: swin("timm"), _attribute("attn.attn_drop", "p", 1.0)),
    "timm Swin, proj_drop": (lambda: swin("timm"), _attribute("attn.proj_drop", "p", 1.0)),
    "timm Swin, drop_path1": (lambda: swin("timm"), _attribute("", "drop_path1", nn.Dropout(1.0))),
    "torchvision Swin, attention_dropout": (lambda: swin("torchvision"), _attribute("", "attention_dropout", 1.0)),
    "torchvision Swin, dropout": (lambda: swin("torchvision"), _attribute("", "dropout", 1.0)),
    **{
        f"timm {kind}, drop_path, {words}": (lambda k=kind: block("se", k), _attribute("", "drop_path", value))
        for kind in ("BasicBlock", "Bottleneck")
        for words, value in (("layer", nn.Dropout(1.0)), ("function", _halved))
    },
    "timm EcaModule, conv2": (lambda: timm("EcaModule", C), _second_layer),
    "timm GatherExcite, gather": (
        lambda: timm("GatherExcite", C, use_mlp=False),
        _attribute("", "gather", lambda x: x.amax((2, 3), keepdim=True)),
    ),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", DROPPED)
def test_dropout_set_after_accelerate_counts(name, compiled):
    """The library's own forward serves, where the op has no dropout."""
    build, change = DROPPED[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = build().double().train()
    x = feature_map((2, 7, 6, C) if "Swin" in name else (2, C, 7, 6), dtype=torch.float64)
    fast = copy.deepcopy(plain)
    assert vf.accelerate(fast).swapped
    call = torch.compile(fast, backend="eager") if compiled else fast
    before = call(x)
    torch.testing.assert_close(before, plain(x), rtol=1e-9, atol=1e-9)
    for module in (plain, fast):
        change(module)
    want = plain(x)
    assert not torch.allclose(want, before)
    torch.testing.assert_close(call(x), want, rtol=1e-9, atol=1e-9)
