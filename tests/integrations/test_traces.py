"""Traces, exports and feature extractors of accelerated models: they work as before `accelerate`, with a free batch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import visattn_fast as vf
from known_modules import MODULES, C
from outside import library, timm_model
from visattn_fast.catalogue import ENTRIES, feature_map
from visattn_fast.models import AttentionResNet

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracers
OUTSIDE = [name for name in MODULES if name not in ENTRIES]


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """Builds a model in eval mode, and the same accelerated."""
    torch.manual_seed(0)
    plain = MODELS[name]().eval()
    fast = copy.deepcopy(plain)
    assert vf.accelerate(fast).swapped
    return plain, fast


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm se": timm_model("resnet10t", block_args={"attn_layer": "se"}),
    "timm eca": timm_model("resnet10t", block_args={"attn_layer": "eca"}),
    "timm cbam": timm_model("resnet10t", block_args={"attn_layer": "cbam"}),
    "timm efficientnet_b0": timm_model("efficientnet_b0"),
    "torchvision mobilenet_v3_small": lambda: library("torchvision.models").mobilenet_v3_small(num_classes=10),
    "AttentionResNet": lambda: AttentionResNet("cbam", width=16, fused=False),
    "torchvision swin_t": lambda: library("torchvision.models.swin_transformer").SwinTransformer(
        [4, 4], 16, [2, 2], [1, 2], [7, 7], num_classes=10
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_trace_gives_the_graph_of_the_library(name):
    plain, fast = models(name)
    x = feature_map((2, 3, 64, 64))
    traced = torch.fx.symbolic_trace(fast)
    want = torch.fx.symbolic_trace(plain)
    assert [(n.op, n.name) for n in traced.graph.nodes] == [(n.op, n.name) for n in want.graph.nodes]
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_extracted_at_the_same_nodes(name):
    extraction = library("torchvision.models.feature_extraction")
    plain, fast = models(name)
    x = feature_map((2, 3, 64, 64))
    nodes = extraction.get_graph_node_names(plain)[1]
    assert extraction.get_graph_node_names(fast)[1] == nodes
    chosen = nodes[len(nodes) // 2 :: max(len(nodes) // 16, 1)]
    want = extraction.create_feature_extractor(plain, chosen)(x)
    got = extraction.create_feature_extractor(fast, chosen)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["export", "jit.trace", "onnx"])
@pytest.mark.parametrize("name", ["timm se", "timm cbam", "torchvision mobilenet_v3_small"])
def test_exported_model_takes_another_batch(name, how):
    plain, fast = models(name)
    check(plain, fast, feature_map((2, 3, 64, 64)), feature_map((5, 3, 64, 64), seed=1), how)


@pytest.mark.parametrize("how", ["export", "jit.trace"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_exported_module_takes_another_batch(name, how):
    torch.manual_seed(0)
    plain = MODULES[name]().eval()
    fast = copy.deepcopy(plain)
    assert vf.accelerate(fast).swapped
    check(plain, fast, feature_map((2, C, 8, 6)), feature_map((5, C, 8, 6), seed=1), how)


def test_exported_ops_take_another_batch():
    """With a backend asked for, the program holds our ops."""
    torch.manual_seed(0)
    plain = MODULES["timm CbamModule"]().train()
    fast = copy.deepcopy(plain)
    vf.accelerate(fast)
    with vf.use_backend("cpp"):
        free = ({0: torch.export.Dim("batch", min=2)},)
        program = torch.export.export(fast, (feature_map((2, C, 8, 6)),), dynamic_shapes=free)
    assert any("visattn_fast" in str(node.target) for node in program.graph.nodes)
    x = feature_map((5, C, 8, 6), seed=1)
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-4, atol=1e-4)


def check(plain: nn.Module, fast: nn.Module, x: torch.Tensor, other: torch.Tensor, how: str) -> None:
    """Exports ``fast`` with the example x and a free batch; the program gives what ``plain`` gives for ``other``."""
    want = plain(other)
    if how == "export":
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},))
        assert not any("visattn_fast" in str(node.target) for node in program.graph.nodes)
        got = program.module()(other)
    elif how == "jit.trace":
        got = torch.jit.trace(fast, x)(other)
    else:
        file = io.BytesIO()
        torch.onnx.export(
            fast, (x,), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n"}}
        )
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        (got,) = (torch.from_numpy(y) for y in session.run(None, {"x": other.numpy()}))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
