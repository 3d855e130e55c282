"""Accelerated blocks and CBAMs without gradients: batch norms in eval mode become part of the gates."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from blocks import C, accelerated, spread
from cases import RecordedOps, feature_map, layouts
from outside import library
from visattn_fast import catalogue

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# The two passes of a norm and a gate that have no op of their own.
FOLDED = ["channel_mean", "channel_affine"]
# The ops of a CBAM that is not one op.
STEPS = ["pool_pixels", "pool_channels", "map_conv", "twofold_scale"]


def ops_called(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Returns the ops that ``module(x)`` calls."""
    with RecordedOps() as recorded:
        module(x)
    return recorded.names


def ops_without_gradients(module: nn.Module, x: torch.Tensor) -> list[str]:
    """Returns the ops that an accelerated module calls; asserts that its result equals that of the original."""
    plain = copy.deepcopy(module)
    vf.restore(plain)
    with torch.no_grad():
        with RecordedOps() as recorded:
            y = module(x)
        want = plain(x)
    assert y.stride() == want.stride()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}[x.dtype]
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    return recorded.names


@pytest.fixture
def any_size(monkeypatch):
    """Folds blocks of any size."""
    normed = importlib.import_module("visattn_fast.integrations.normed")
    monkeypatch.setitem(normed._WORTH_FOLDING, "cpu", 0)


@pytest.mark.parametrize(
    ("attention", "kind", "options"),
    [
        ("se", "Bottleneck", {}),
        ("se", "BasicBlock", {"act_layer": nn.SiLU}),
        ("eca", "Bottleneck", {}),
        ("ceca", "BasicBlock", {}),
        ("ese", "BasicBlock", {}),
        (None, "SEBlock", {}),
        (None, "SEBlock", {"acti_type_final": None, "acti_type_1": "elu"}),
    ],
    ids=lambda p: "-".join(map(str, p)) if isinstance(p, dict) else p,
)
@layouts
def test_block_stores_no_normed_map(attention, kind, options, layout, any_size):
    """Norm and gate are one op or two passes, in any dtype."""
    module = accelerated(attention, kind, **options).eval()
    whole = {"se": "se_normed", "eca": "eca_normed", None: "" if options else "se_normed"}.get(attention)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((2, C, 6, 5), (3, C, 61, 33)):
            x = feature_map(shape, layout, dtype)
            assert ops_without_gradients(module.to(dtype), x) == ([whole] if whole else FOLDED)


def test_norm_in_use_elsewhere_is_not_folded(any_size):
    """Norm and gate stay apart in training, with hooks, with gradients, and under a chosen reference."""
    module, x = accelerated("se").eval(), feature_map((2, C, 6, 5), "nchw", torch.float64)
    assert ops_without_gradients(module, x) == ["se_normed"]
    module.bn3.momentum = None  # has no effect in eval mode
    assert ops_without_gradients(module, x) == ["se_normed"]
    hooked: list[str] = []
    for inner in ("bn3", "se"):
        hook = module.get_submodule(inner).register_forward_hook(lambda *_: hooked.append("ran"))
        assert ops_without_gradients(module, x) == ["se_infer"]
        assert len(hooked) == 2  # once by the original
        hook.remove()
        hooked.clear()
    with vf.use_backend("reference"):
        assert ops_without_gradients(module, x) == []
    module.requires_grad_(False)
    for wanted in (module.bn3.weight, module.se.fc1.weight, x):
        wanted.requires_grad_()
        assert ops_called(module, x) == ["se_fwd"]
        wanted.requires_grad_(False)
    assert ops_called(module, x) == ["se_normed"]
    module.bn3.train()
    assert ops_called(module, x) == ["se_infer"]


def test_small_maps_keep_norm_and_gate_apart():
    """If there is no op of both, norm and gate apart take fewer calls, which decides on small maps."""
    module = accelerated("ceca", "BasicBlock").eval().float()
    assert ops_without_gradients(module, feature_map((2, C, 8, 8), "nchw", torch.float32)) == [
        "channel_mean",
        "channel_scale_fwd",
    ]
    assert ops_without_gradients(module, feature_map((2, C, 91, 91), "nchw", torch.float32)) == FOLDED


def cbam(**options: Any) -> nn.Module:
    """Builds an accelerated CBAM of timm in eval mode."""
    torch.manual_seed(0)
    module = spread(library("timm.layers.cbam").CbamModule(C, **options)).eval()
    vf.accelerate(module)
    return module


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cbam_is_one_op(dtype, layout):
    """timm's norm becomes part of the convolution; maxima with and without ties give the original's result."""
    for x in (feature_map((2, C, 7, 6), layout, dtype), feature_map((2, C, 7, 6), layout, dtype).relu().round()):
        x = x.contiguous(memory_format=catalogue.LAYOUTS[layout])
        assert ops_without_gradients(cbam(spatial_kernel_size=3).to(dtype), x) == ["cbam_fwd"]


def test_cbam_with_a_bias_and_a_plain_norm_is_one_op():
    module = cbam()
    module.spatial.conv.conv.bias = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    module.spatial.conv.bn.affine, module.spatial.conv.bn.weight, module.spatial.conv.bn.bias = False, None, None
    assert ops_without_gradients(module, feature_map((2, C, 7, 6), "nchw", torch.float64)) == ["cbam_fwd"]


def test_cbam_that_is_not_one_op_runs_in_steps():
    """The norm is in training, other layers stand inside, a hook is registered, or a gradient is required."""
    x = feature_map((2, C, 7, 6), "nchw", torch.float64)
    others: list[dict[str, Any]] = [{"act_layer": nn.SiLU}, {"mlp_bias": True}, {"gate_layer": "hard_sigmoid"}]
    for options in others:
        assert ops_without_gradients(cbam(**options), x) == STEPS
    module = cbam()
    hooked = module.spatial.conv.bn.register_forward_hook(lambda *_: None)
    assert ops_without_gradients(module, x) == STEPS
    hooked.remove()
    assert ops_called(module, x) == STEPS  # the parameters require gradients
    module.spatial.conv.bn.train()
    assert ops_without_gradients(module, x) == STEPS


def test_cbam_in_a_compiled_block_is_one_op():
    """The gate of a block adds the shortcut, in eager mode and compiled."""
    module, x = accelerated("cbam", "BasicBlock").eval(), feature_map((2, C, 7, 6), "nchw", torch.float64)
    assert ops_without_gradients(module, x) == ["cbam_fwd"]
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.extend(str(n.target) for n in graph.graph.nodes if "visattn_fast" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y, want = torch.compile(module, fullgraph=True, backend=backend)(x), module(x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    assert graphs == ["visattn_fast.cbam_fwd.default"]
