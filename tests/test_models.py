"""AttentionResNet: the fused network is the reference network, in results, gradients and state_dict."""

from __future__ import annotations

import pytest
import torch

from visattn_fast import catalogue
from visattn_fast.models import GATES, AttentionResNet

attentions = pytest.mark.parametrize("attention", [*GATES, None])


def pair(attention: str | None, **arguments) -> list[AttentionResNet]:
    """The fused and the reference network, drawn from one seed."""
    networks = []
    for fused in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks.append(AttentionResNet(attention, fused=fused, **arguments).double())
    return networks


@attentions
@pytest.mark.parametrize("depths", [(1, 2), (2, 1, 1)])
def test_fused_is_reference(attention, depths):
    fused, reference = pair(attention, num_classes=5, width=8, depths=depths)
    assert list(fused.state_dict()) == list(reference.state_dict())
    for p, q in zip(fused.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)  # one seed, one network
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
def test_state_dict_crosses(attention):
    fused, reference = pair(attention, width=8)
    other = AttentionResNet(attention, width=8, fused=False).double()
    other.load_state_dict(fused.state_dict())
    x = catalogue.feature_map((2, 3, 8, 8), dtype=torch.float64)
    torch.testing.assert_close(other.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("attention", GATES)
def test_gates_are_of_the_catalogue(attention):
    entry = catalogue.ENTRIES[attention]
    for network, expected in zip(pair(attention, depths=(2, 1)), (entry.fast, entry.reference), strict=True):
        assert [type(block.gate) for stage in network.stages for block in stage] == [expected] * 3


def test_gates():
    """Every class that gates a map, once, and as it trains."""
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
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionResNet(**arguments)


def test_bad_input():
    with pytest.raises(ValueError, match=r"x must have 3 channels.*\(2, 1, 8, 8\)"):
        AttentionResNet()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x must have shape \[N, C, H, W\]"):
        AttentionResNet()(torch.zeros(3, 8, 8))
