"""attention_maps returns every gate of a model, and changes nothing in the model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import entries, feature_map
from gated_net import KEYS, assert_unchanged, images, net, snapshot
from visattn_fast import catalogue
from visattn_fast.models import AttentionResNet

modes = pytest.mark.parametrize("training", [True, False])


@entries
@modes
def test_fused_and_reference_modules_return_the_same_gates(entry, training):
    """`attention` returns the same gates in both classes, and changes no state."""
    pair = [module.train(training) for module in entry.pair(32)]
    x = feature_map((2, 32, 6, 5), "nchw", torch.float32)
    gates = []
    for module in pair:
        before = snapshot(module)
        gates.append(module.attention(x))
        assert_unchanged(before, module)
    assert gates[0]
    assert gates[0].keys() == gates[1].keys()
    for kind, gate in gates[0].items():
        assert len(gate) == 2
        torch.testing.assert_close(gate, gates[1][kind])


def test_input_times_gates_is_the_result():
    x = feature_map((2, 32, 6, 5), "nchw", torch.float64)
    for name in ("se", "eca", "cbam"):
        module, _ = catalogue.ENTRIES[name].pair(32, torch.float64)
        gated = x
        for gate in module.attention(x).values():
            gated = gated * gate
        torch.testing.assert_close(module(x), gated)
    for name in ("channel_attention", "spatial_attention"):
        module, _ = catalogue.ENTRIES[name].pair(32, torch.float64)
        (gate,) = module.attention(x).values()
        torch.testing.assert_close(module(x), gate)


@modes
@pytest.mark.parametrize("fused", [True, False])
def test_maps_name_the_gates_in_their_order(fused, training):
    """The maps are those of eval mode, for the gates that run; the model keeps its state and its mixed modes."""
    model = net(fused).train(training)
    model.conv[1].eval()
    expected = copy.deepcopy(model).eval()(images())
    before = snapshot(model)
    maps = vf.attention_maps(model, images())
    assert_unchanged(before, model)
    assert list(maps) == KEYS
    assert not any(gate.requires_grad for gate in maps.values())
    shapes = [tuple(gate.shape) for gate in maps.values()]
    assert shapes == [(2, 16, 1, 1)] * 4 + [(2, 1, 6, 5)]
    h = model.eval().conv(images())
    torch.testing.assert_close(maps["se"], model.se.attention(h)["channel"])
    u = h * maps["se"] * maps["twice[0]"] * maps["twice[1]"]
    torch.testing.assert_close(maps["cbam.channel"], model.cbam.attention(u)["channel"])
    assert torch.equal(model(images()), expected)


def test_model_may_take_several_arguments():
    model = net()
    assert list(vf.attention_maps(model, (images(), torch.tensor(2.0)))) == KEYS


def test_model_may_be_a_gate_itself():
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    assert list(vf.attention_maps(vf.FastSE(16), x)) == ["channel"]
    assert list(vf.attention_maps(vf.FastCBAM(16), x)) == ["channel", "spatial"]
    with pytest.raises(ValueError, match="or one that accelerate knows, got Conv2d without"):
        vf.attention_maps(nn.Conv2d(16, 16, 1), x)


def test_other_modules_with_an_attention_are_no_gates():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = vf.FastSE(16)  # a submodule, not the method

        def forward(self, x):
            return self.attention(x)

    class Other(nn.Module):
        def attention(self, query, key):
            raise AssertionError("takes other arguments than forward")

        def forward(self, x):
            return x

    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    assert list(vf.attention_maps(nn.Sequential(Layer(), Other()), x)) == ["0.attention"]


def test_maps_of_an_attention_resnet_name_its_stages():
    maps = vf.attention_maps(AttentionResNet("cbam", width=8), feature_map((1, 3, 12, 9), "nchw", torch.float32))
    assert list(maps) == [f"stages.{i}.0.gate.{kind}" for i in range(3) for kind in ("channel", "spatial")]


@pytest.mark.parametrize("need_weights", [True, False])
def test_sequence_layers_return_their_weights(need_weights):
    """The weights are returned although the forward pass may keep none."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = vf.FastAttentionLayer(8, 4, 6)
            self.sequence = vf.FastSequenceAttention("general", 6, 8)
            self.pooling = vf.FastAttentionPooling()

        def forward(self, x, lengths):
            y, _ = self.layer(x, need_weights=need_weights)
            z, _ = self.sequence(y, x, key_lengths=lengths, need_weights=need_weights)
            return self.pooling(z[..., 0], x[..., 0], x[..., 1], need_weights=need_weights)[0]

    x, lengths = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 3])
    maps = vf.attention_maps(Model(), (x, lengths))
    assert list(maps) == ["layer", "sequence", "pooling"]
    for weights in maps.values():
        assert weights.shape == (2, 5, 5)
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 5))
    assert (maps["sequence"][1, :, 3:] == 0).all()


def test_failing_model_is_unchanged():
    model = net().train()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        vf.attention_maps(model, torch.zeros(1, 5, 8, 8))
    assert_unchanged(before, model)


@pytest.mark.parametrize("fused", [True, False])
def test_maps_have_the_dtype_of_the_model(fused):
    model = net(fused).bfloat16()
    assert {gate.dtype for gate in vf.attention_maps(model, images(torch.bfloat16)).values()} == {torch.bfloat16}
    if fused:  # a map of another dtype than the weights
        gate = vf.FastSE(16)
        x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
        mixed = vf.attention_maps(gate, x.bfloat16())["channel"]
        torch.testing.assert_close(mixed, gate.attention(x)["channel"].detach(), rtol=0.01, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo, about a compiled part
@pytest.mark.parametrize("wrap", ["parallel", "compiled", "part", "in place"])
def test_maps_of_wrapped_models_are_those_of_the_model_inside(wrap):
    """Names and maps do not depend on the wrapper; compiled parts run eagerly."""
    torch._dynamo.reset()
    model = net().eval()
    expected = vf.attention_maps(model, images())
    wrapped = model
    if wrap == "parallel":
        wrapped = nn.DataParallel(model)
    elif wrap == "compiled":
        wrapped = torch.compile(model, backend="eager")
    elif wrap == "part":
        model.cbam = torch.compile(model.cbam, backend="eager")
    else:
        model.compile(backend="eager")
    wrapped(images())
    maps = vf.attention_maps(wrapped, images())
    assert list(maps) == KEYS
    assert all(torch.equal(maps[key], gate) for key, gate in expected.items())
