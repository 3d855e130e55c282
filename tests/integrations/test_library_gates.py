"""attention_maps and watch_gates know the modules of other libraries, as they are and accelerated."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import visattn_fast as vf
from known_modules import MODULES, C, spread_statistics
from outside import library, timm_model
from visattn_fast import reference
from visattn_fast.catalogue import ENTRIES, feature_map

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = {"ChannelAttention": ["channel"], "SpatialAttention": ["spatial"], "CoordAttn": ["height", "width"]}
BOTH = ("Cbam", "CBAM", "SCSE")  # channels, then pixels
POSITIONS = ("ultralytics Attention", "ultralytics AAttn")  # attention over positions scales nothing
SUMS = ("skip", "Residual", "SCSE")  # their result is not the product of the input and the gates


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    spread_statistics(module)
    return module


@pytest.mark.parametrize("fused", [True, False], ids=["accelerated", "plain"])
@pytest.mark.parametrize("name", [name for name in MODULES if name not in ENTRIES and name not in POSITIONS])
def test_gates_have_their_usual_names_and_scale_the_input(name, fused):
    module, x = built(name).eval(), feature_map((2, C, 7, 6), dtype=torch.float64)
    y = module(x)
    if fused:
        vf.accelerate(module)
    maps = vf.attention_maps(module, x)
    default = ["channel", "spatial"] if any(part in name for part in BOTH) else ["channel"]
    assert list(maps) == next((kinds for part, kinds in KINDS.items() if part in name), default)
    for kind, gate in maps.items():
        expected = {"channel": (2, C, 1, 1), "spatial": (2, 1, 7, 6), "height": (2, C, 7, 1), "width": (2, C, 1, 6)}
        assert gate.shape == expected[kind]
    if not any(part in name for part in SUMS):
        torch.testing.assert_close(x * math.prod(maps.values()), y, rtol=1e-9, atol=1e-9)


def test_gate_of_windows_has_one_value_per_pixel():
    module = library("timm.layers").GatherExcite(C, extent=2, use_mlp=False).eval()
    x = feature_map((2, C, 8, 6))
    maps = vf.attention_maps(module, x)
    assert list(maps) == ["element"]
    torch.testing.assert_close(x * maps["element"], module(x))


@pytest.mark.parametrize("fused", [True, False], ids=["accelerated", "plain"])
@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_windows_return_the_weights_that_tokens_receive(name, fused):
    """They equal those of our module with the library's weights."""
    torch.manual_seed(0)
    if name == "timm":
        swin = library("timm.models.swin_transformer")
        module = swin.SwinTransformerBlock(C, (10, 12), 2, window_size=7, shift_size=3).eval()
        attention, before = module.attn, module.norm1
    else:
        swin = library("torchvision.models.swin_transformer")
        module = attention = swin.ShiftedWindowAttention(C, [7, 7], [3, 3], 2)
        before = nn.Identity()
    ours = reference.WindowAttention2d(C, 7, 2, 3, layout="nhwc", pad_first=name == "torchvision")
    ours.load_state_dict(attention.state_dict())
    x = feature_map((2, 10, 12, C))
    if fused:
        vf.accelerate(module)
    rng = torch.get_rng_state()
    maps = vf.attention_maps(module, x)
    assert torch.equal(rng, torch.get_rng_state())
    assert list(maps) == ["received"]
    torch.testing.assert_close(maps["received"], ours.attention(before(x))["received"])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fused", [True, False], ids=["accelerated", "plain"])
@pytest.mark.parametrize("name", POSITIONS)
def test_attention_over_positions_returns_the_weights_that_they_receive(name, fused, training):
    """They equal those of our module with the library's weights; running statistics stay as they are."""
    module, x = built(name).train(training), feature_map((2, C, 8, 6), dtype=torch.float64)
    options = {"attn_ratio": 1.0, "areas": 2, "kernel_size": 7} if name.endswith("AAttn") else {}
    ours = reference.MapAttention2d(C, 2, **options).double().train(training)
    ours.load_state_dict(module.state_dict())
    if fused:
        vf.accelerate(module)
    maps = vf.attention_maps(module, x)
    assert list(maps) == ["received"]
    torch.testing.assert_close(maps["received"], vf.attention_maps(ours, x)["received"])
    torch.testing.assert_close(module.state_dict(), ours.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(module(x), ours(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm_model("resnet10t", block_args={"attn_layer": "cbam"})()


@pytest.mark.parametrize("fused", [True, False], ids=["accelerated", "plain"])
def test_watched_training_is_the_same_bit_for_bit(fused):
    """Each gate is reported; running statistics are updated once a step, and blocks stay fused."""
    plain, x = resnet(), feature_map((4, 3, 32, 32))
    if fused:
        vf.accelerate(plain)
    watched, seen = copy.deepcopy(plain), []
    vf.watch_gates(watched, seen.append, every=1)
    for model in (plain, watched):
        model.train()(x).square().sum().backward()
    names = [f"layer{i}.0.se.{kind}" for i in range(1, 5) for kind in ("channel", "spatial")]
    assert [(s.name, s.kind) for s in seen] == [(name, name.rpartition(".")[2]) for name in names]
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for a, b in zip(plain.buffers(), watched.buffers(), strict=True):
        assert torch.equal(a, b)
    assert list(vf.attention_maps(watched, x)) == names


@pytest.mark.parametrize("watched", [True, False])
def test_a_look_keeps_blocks_fused(watched):
    model, x = resnet().eval(), feature_map((2, 3, 32, 32))
    vf.accelerate(model)
    if watched:
        vf.watch_gates(model)
        assert vf.explain(model, x).called_layers == {}
    else:
        model.layer1[0].se.register_forward_hook(lambda *_: None)
        assert vf.explain(model, x).called_layers == {"layer1.0": "se has hooks"}
