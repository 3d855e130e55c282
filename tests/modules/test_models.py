"""The networks of `models`: the fused network equals the reference network in results, gradients and state_dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import within_budget
from outside import library
from visattn_fast import catalogue
from visattn_fast.models import GATES, AttentionResNet, VGG16WithAttention

attentions = pytest.mark.parametrize("attention", [*GATES, None])


def pair(attention: str | None, **arguments) -> list[AttentionResNet]:
    """Builds the fused and the reference network from one seed."""
    networks = []
    for fused in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks.append(AttentionResNet(attention, fused=fused, **arguments).double())
    return networks


@attentions
@pytest.mark.parametrize("depths", [(1, 2), (2, 1, 1)])
def test_fused_resnet_matches_reference(attention, depths):
    fused, reference = pair(attention, num_classes=5, width=8, depths=depths)
    assert list(fused.state_dict()) == list(reference.state_dict())
    for p, q in zip(fused.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)  # drawn from one seed
    x = catalogue.feature_map((3, 3, 13, 10), dtype=torch.float64)
    for training in (True, False):
        outputs = [network.train(training)(x) for network in (fused, reference)]
        assert outputs[0].shape == (3, 5)
        torch.testing.assert_close(*outputs)
    for network, out in zip((fused, reference), outputs, strict=True):
        out.square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())
    for p, q in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for b, c in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(b, c)


@attentions
def test_resnet_state_dict_crosses_classes(attention):
    fused, reference = pair(attention, width=8)
    other = AttentionResNet(attention, width=8, fused=False).double()
    other.load_state_dict(fused.state_dict())
    x = catalogue.feature_map((2, 3, 8, 8), dtype=torch.float64)
    torch.testing.assert_close(other.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("attention", GATES)
def test_resnet_blocks_hold_the_gates_of_the_catalogue(attention):
    entry = catalogue.ENTRIES[attention]
    for network, expected in zip(pair(attention, depths=(2, 1)), (entry.fast, entry.reference), strict=True):
        assert [type(block.gate) for stage in network.stages for block in stage] == [expected] * 3


def test_every_gate_of_the_catalogue_is_offered_once():
    """Each class that gates a map has one name, that of its training mode."""
    assert {"se", "eca", "cbam"} <= set(GATES)
    assert all(catalogue.ENTRIES[name].training for name in GATES)
    assert len({catalogue.ENTRIES[name].fast for name in GATES}) == len(GATES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "senet"}, "attention must be None or one of 'se', 'eca', .*, got 'senet'"),
        ({"attention": "channel_attention"}, "attention must be None or one of"),
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"width": 8.0}, r"width must be a positive int, got 8\.0"),
        ({"in_channels": -1}, "in_channels must be a positive int, got -1"),
        ({"depths": ()}, "depths must name at least one stage, got none"),
        ({"depths": (1, 0)}, "every entry of depths must be a positive int, got 0"),
    ],
)
def test_bad_resnet_argument_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionResNet(**arguments)


def test_bad_resnet_input_raises():
    with pytest.raises(ValueError, match=r"x must have 3 channels.*\(2, 1, 8, 8\)"):
        AttentionResNet()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\]"):
        AttentionResNet()(torch.zeros(3, 8, 8))


@pytest.fixture(scope="module")
def vgg() -> VGG16WithAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VGG16WithAttention(dropout=0.0).eval()


def structure(**arguments) -> VGG16WithAttention:
    """Builds a VGG on the meta device, without memory for its 138 million parameters."""
    with torch.device("meta"):
        return VGG16WithAttention(**arguments)


def vgg_run(network: VGG16WithAttention, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the logits, and the gradients of x and of all parameters outside the classifier."""
    x = x.detach().requires_grad_()
    inputs = {"x": x}
    inputs.update((n, p) for n, p in network.named_parameters() if not n.startswith("classifier"))
    y = network(x)
    grad = catalogue.feature_map((*y.shape, 1, 1), dtype=torch.float64, seed=1).flatten(1).to(y.dtype)
    return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))}


def test_vgg_has_torchvisions_layers_and_five_gates():
    """The layers have torchvision's names; a gate of the right class stands before each pool."""
    convolutions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    for fused, attention in ((True, vf.FastLocalAttention), (False, vf.reference.LocalAttention)):
        network = structure(num_classes=7, fused=fused)
        assert [type(gate) for gate in network.attentions] == [attention] * 5
        assert [i for i, layer in enumerate(network.features) if isinstance(layer, nn.Conv2d)] == convolutions
        assert [i for i, layer in enumerate(network.features) if isinstance(layer, nn.MaxPool2d)] == [4, 9, 16, 23, 30]
        assert [layer.p for layer in network.classifier if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
        assert network(torch.zeros(2, 3, 45, 33, device="meta")).shape == (2, 7)


def test_vgg_loads_torchvisions_state_dict():
    with torch.device("meta"):
        other = library("torchvision.models").vgg16().state_dict()
    ours = structure().state_dict()
    assert {name: t.shape for name, t in other.items()} == {
        name: t.shape for name, t in ours.items() if not name.startswith("attentions.")
    }
    missing, unexpected = structure().load_state_dict(other, strict=False, assign=True)
    assert not unexpected
    assert all(key.startswith("attentions.") for key in missing)


def test_vgg_starts_with_scaled_weights_and_open_gates(vgg):
    assert all(not p.any() for name, p in vgg.named_parameters() if name.endswith("bias"))
    for layer in (vgg.features[2], vgg.features[28], vgg.classifier[3], vgg.attentions[4].spatial_attention[0]):
        deviation = (2 / layer.weight[0].numel()) ** 0.5
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
    gates = vf.attention_maps(vgg, catalogue.feature_map((1, 3, 64, 64)))
    assert len(gates) == 10
    assert all((gate - 0.5).abs().max() < 0.02 for gate in gates.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_vgg_matches_reference(vgg, dtype):
    x = catalogue.feature_map((2, 3, 32, 40))
    exact = structure(dropout=0.0, fused=False)
    exact.load_state_dict({name: t.double() for name, t in vgg.state_dict().items()}, assign=True)
    runs = []
    for fused in (True, False):
        network = structure(dropout=0.0, fused=fused)
        network.load_state_dict({name: t.to(dtype) for name, t in vgg.state_dict().items()}, assign=True)
        runs.append(vgg_run(network, x.to(dtype)))
    oracle = vgg_run(exact, x.double())
    within_budget(*runs, oracle, oracle)


def test_vgg_state_dict_crosses_classes(vgg):
    other = structure(fused=False)
    assert list(other.state_dict()) == list(vgg.state_dict())
    other.load_state_dict(vgg.state_dict(), assign=True)
    x = catalogue.feature_map((1, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), vgg(x))


def test_bad_vgg_argument_or_input_raises():
    with pytest.raises(ValueError, match="num_classes must be a positive int, got 0"):
        VGG16WithAttention(num_classes=0)
    with pytest.raises(ValueError, match="dropout"):
        structure(dropout=2.0)
    with pytest.raises(ValueError, match=r"x must have 3 channels.*\(2, 1, 32, 32\)"):
        structure()(torch.zeros(2, 1, 32, 32, device="meta"))
    with pytest.raises(ValueError, match=r"at least 32 pixels high and wide, got shape \(1, 3, 31, 64\)"):
        structure()(torch.zeros(1, 3, 31, 64, device="meta"))
