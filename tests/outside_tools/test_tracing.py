"""torch.fx traces through gates to the layers inside, as through plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from outside import library
from twins import TWINS, images, twins

pytestmark = pytest.mark.filterwarnings("ignore")
# Plain ones look at the size of x.
UNTRACED = ("soca", "window_attention", "split_attention", "self_attention", "map_attention")
names = pytest.mark.parametrize("name", [name for name in TWINS if name not in UNTRACED])


def calls(graph_module):
    return [node.target for node in graph_module.graph.nodes if node.op == "call_module"]


@names
def test_symbolic_trace_calls_the_layers(name):
    plain, fast = (model.eval() for model in twins(name))
    traced = fx.symbolic_trace(fast)
    assert calls(traced) == calls(fx.symbolic_trace(plain))
    torch.testing.assert_close(traced(images()), plain(images()))


@names
def test_feature_extraction_from_layers_inside(name):
    extraction = library("torchvision.models.feature_extraction")
    plain, fast = (model.eval() for model in twins(name))
    names = extraction.get_graph_node_names(plain)[1]
    layers = [n for n, m in plain.named_modules() if n in names and not list(m.children())]
    got, want = (extraction.create_feature_extractor(model, layers)(images()) for model in (fast, plain))
    torch.testing.assert_close(got, want)
