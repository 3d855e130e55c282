"""Accelerated modules and blocks whose layers were altered, before or after: they equal the altered original."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from alterations import ALTERATIONS
from blocks import GATED, inputs
from cases import RecordedOps, run
from known_modules import C, spread_statistics
from replicas import replica

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request) -> bool:
    return request.param


def built(name: str, training: bool) -> nn.Module:
    torch.manual_seed(0)
    module = GATED[name]().double().train(training)
    spread_statistics(module)
    return module


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
    assert got.keys() == want.keys(), what
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{what}, {key}: {m}")


@pytest.mark.parametrize("alteration", ALTERATIONS)
@pytest.mark.parametrize("name", GATED)
def test_altered_layers_are_called(name, alteration, training):
    """Every inner layer in turn, altered before or after `accelerate`: results, gradients, running statistics."""
    plain, x = built(name, training), inputs(name)
    for layer in [layer for layer, _ in plain.named_modules() if layer]:
        alter = functools.partial(ALTERATIONS[alteration], name=layer)
        try:
            want = run(plain, x, change=alter)
        except (RuntimeError, AttributeError):
            continue  # a backward hook before an activation in place; torchvision's Swin reads weights itself
        fast = copy.deepcopy(plain)
        vf.accelerate(fast)
        assert_equal(run(fast, x, change=alter), want, f"{layer}, altered after")
        assert_equal(run(plain, x, change=lambda m: (alter(m), vf.accelerate(m))), want, f"{layer}, altered before")  # noqa: B023


# Name -> how its layers are replaced. Activations and norms that other libraries put there, and none at all.
REPLACED: dict[str, tuple[str, str, Callable[[], nn.Module | None]]] = {
    f"{name}: {layer} = {made.__name__}": (name, layer, functools.partial(made, *arguments))
    for name, layer, made, *arguments in [
        ("timm SEModule", "act", nn.GELU),
        ("timm SEModule", "gate", nn.Hardsigmoid),
        ("timm SEModule", "gate", nn.Tanh),
        ("timm SEModule", "bn", nn.GroupNorm, 1, 8),
        ("timm SqueezeExcite", "gate", nn.Tanh),
        ("timm EcaModule", "gate", nn.Hardsigmoid),
        ("timm EcaModule", "conv", nn.Conv1d, 1, 1, 5, 1, 2),
        ("timm CbamModule", "channel.act", nn.GELU),
        ("timm CbamModule", "channel.act", nn.BatchNorm2d, 2),
        ("timm CbamModule", "spatial.conv", nn.Conv2d, 2, 1, 3, 1, 1),
        ("timm CbamModule", "spatial.conv.bn", nn.Identity),
        ("timm CoordAttn", "act", nn.ReLU),
        ("timm CoordAttn", "bn1", nn.GroupNorm, 1, 8),
        ("timm CoordAttn", "gate", nn.Hardsigmoid),
        ("torchvision SqueezeExcitation", "avgpool", nn.AdaptiveMaxPool2d, 1),
        ("torchvision SqueezeExcitation", "activation", nn.GELU),
        ("monai ChannelSELayer", "fc.3", nn.Hardsigmoid),
        ("monai ChannelSELayer", "avg_pool", nn.AdaptiveMaxPool2d, 1),
        ("smp SCSEModule", "cSE.2", nn.GELU),
        ("smp SCSEModule", "sSE.1", nn.Tanh),
        ("ultralytics CBAM", "spatial_attention.act", nn.Tanh),
        ("ultralytics CBAM", "channel_attention.pool", nn.AdaptiveMaxPool2d, 1),
        ("timm BasicBlock, eca", "act2", nn.GELU),
        ("timm BasicBlock, eca", "se", nn.Identity),
        ("timm BasicBlock, eca", "bn2", nn.GroupNorm, 4, C),
        ("timm BasicBlock, eca", "bn2", nn.Identity),
        ("timm Bottleneck, se", "act3", nn.Identity),
        ("timm Bottleneck, se", "bn3", nn.InstanceNorm2d, C),
        ("monai SEBlock", "act", nn.GELU),
        ("monai SEBlock", "se_layer", nn.Identity),
        ("monai SEBlock", "conv3.adn.N", nn.GroupNorm, 4, C),
        ("monai SEBlock", "conv3.adn", nn.Identity),
        ("AttentionBlock", "gate", nn.Identity),
        ("AttentionBlock, fused", "gate", nn.Identity),
    ]
}


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_layers_are_called(case, training):
    """Replaced before or after `accelerate`, with and without gradients."""
    name, layer, make = REPLACED[case]
    plain, x = built(name, training), inputs(name)
    torch.manual_seed(1)
    other = make().double().train(training)

    def replace(module: nn.Module) -> None:
        module.set_submodule(layer, copy.deepcopy(other))

    want = run(plain, x, change=replace)
    fast = copy.deepcopy(plain)
    vf.accelerate(fast)
    assert_equal(run(fast, x, change=replace), want, "after")
    assert_equal(run(plain, x, change=lambda m: (replace(m), vf.accelerate(m))), want, "before")
    replace(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), want["y"], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("setting", ["bias", "dilation", "padding_mode"])
def test_other_settings_of_a_convolution_count(setting):
    """A bias, a dilation, a padding mode of timm's ECA and of CBAM's spatial gate."""
    for name, layer in (("timm EcaModule", "conv"), ("timm CbamModule", "spatial.conv.conv")):
        plain, x = built(name, training=False), inputs(name)

        def change(module: nn.Module, layer: str = layer) -> None:
            conv: Any = module.get_submodule(layer)
            if setting == "bias":
                conv.bias = nn.Parameter(torch.ones(1, dtype=torch.float64))
            elif setting == "dilation":
                conv.dilation, conv.padding = (2,) * len(conv.padding), tuple(2 * p for p in conv.padding)
            else:
                conv.padding_mode = "circular"
                conv._reversed_padding_repeated_twice = [p for p in reversed(conv.padding) for _ in range(2)]

        want = run(plain, x, change=change)
        fast = copy.deepcopy(plain)
        vf.accelerate(fast)
        assert_equal(run(fast, x, change=change), want, f"{name}, {setting}")


@pytest.mark.parametrize("name", ["timm Bottleneck, se", "timm BasicBlock, cbam", "monai SEBlock", "AttentionBlock"])
def test_hooks_see_what_the_library_shows_them(name):
    """A hook on a block's gate sees the gate's own result, a hook on its last activation runs."""
    plain, x, seen = built(name, training=False), inputs(name), {}
    fast = copy.deepcopy(plain)
    vf.accelerate(fast)
    hooked = [layer for layer in ("se", "se_layer", "gate", "act", "act2", "act3") if layer in plain._modules]
    for which, module in (("plain", plain), ("fast", fast)):
        for layer in hooked:
            seen[which, layer] = got = []
            module.get_submodule(layer).register_forward_hook(
                lambda _, args, y, got=got: got.append(y.detach().clone())
            )
        module(x)
    for layer in hooked:
        torch.testing.assert_close(seen["fast", layer], seen["plain", layer], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GATED)
def test_replicas_of_data_parallel_give_the_same(name):
    """With biases where the fused forward expects none."""
    plain, x = built(name, training=False), inputs(name)
    for layer in plain.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)) and layer.bias is None:
            layer.bias = nn.Parameter(torch.rand(layer.weight.shape[0], dtype=torch.float64))
    fast = copy.deepcopy(plain)
    vf.accelerate(fast)
    with torch.no_grad():
        torch.testing.assert_close(replica(fast)(x), plain(x), rtol=1e-9, atol=1e-9)


def test_falling_back_is_logged_once_by_name(caplog):
    model = nn.Sequential(built("timm SEModule", training=False))
    vf.accelerate(model)
    model[0].act = nn.GELU()
    with caplog.at_level(logging.INFO, logger="visattn_fast"):
        for _ in range(3):
            model(inputs(""))
    assert [r.getMessage() for r in caplog.records] == [
        "0: FastSEModule calls its layers: act is GELU, not ReLU or SiLU"
    ]


def test_explain_says_which_layers_are_called():
    """And names the ops that a call then takes."""
    model = nn.Sequential(built("timm SEModule", training=False), built("timm CbamModule", training=False))
    vf.accelerate(model)
    explained = vf.explain(model, inputs(""))
    assert explained.called_layers == {}
    assert [call.name for call in explained.calls] == ["se", "gate_twice", "map_conv"]
    model[0].act = nn.GELU()
    model[1].spatial.conv.register_forward_hook(lambda *_: None)
    explained = vf.explain(model, inputs(""))
    assert explained.called_layers == {"0": "act is GELU, not ReLU or SiLU"}
    assert [call.name for call in explained.calls] == ["gate_channels", "gate_twice"]
    assert str(explained).splitlines()[-1] == "0 calls its layers: act is GELU, not ReLU or SiLU"


@pytest.mark.parametrize("name", ["timm Bottleneck, se", "timm BasicBlock, cbam", "monai SEBlock", "timm SEModule"])
def test_explain_names_the_ops_of_a_call_without_gradients(name):
    """Norms that become part of the gate, and a CBAM that is one op."""
    model, x = built(name, training=False), inputs(name)
    vf.accelerate(model)
    with torch.no_grad():
        explained = vf.explain(model, x)
        with RecordedOps() as recorded:
            model(x)
    assert [op for call in explained.calls for op in call.ops] == recorded.names != []


def test_use_backend_reference_calls_every_layer():
    """The switch for tools that count or trace layers."""
    for name in ("timm SEModule", "timm CbamModule", "torchvision SqueezeExcitation", "timm Bottleneck, se"):
        model, x, called = built(name, training=False), inputs(name), []
        plain = copy.deepcopy(model)
        vf.accelerate(model)
        forward = nn.Conv2d.forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Conv2d, "forward", lambda self, x: called.append(self) or forward(self, x))  # noqa: B023
            with vf.use_backend("reference"):
                y = model(x)
        assert set(called) == {m for m in model.modules() if isinstance(m, nn.Conv2d)}
        assert torch.equal(y, plain(x))
