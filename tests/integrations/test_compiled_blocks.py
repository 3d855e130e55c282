"""Accelerated blocks of timm and MONAI under torch.compile, which sees batch norm and gate as PyTorch's operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

import visattn_fast as vf
from blocks import C, accelerated, block
from cases import run
from known_modules import MODULES
from visattn_fast.catalogue import feature_map

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    ("attention", "kind", "training", "options", "layout"),
    [
        ("se", "Bottleneck", True, {}, "channels_last"),
        ("se", "BasicBlock", False, {}, "nchw"),
        ("eca", "BasicBlock", True, {"act_layer": nn.SiLU}, "nchw"),
        ("ceca", "BasicBlock", True, {}, "channels_last"),
        (None, "SEBlock", True, {}, "nchw"),
    ],
)
def test_compiled_block_matches_the_original(attention, kind, training, options, layout):
    """Results, gradients and running statistics equal those of the original block in eager mode."""
    torch._dynamo.reset()
    plain = block(attention, kind, **options).train(training)
    fast = accelerated(attention, kind, **options).train(training)
    x = 5 + feature_map((3, C, 5, 4), layout, torch.float64)
    want = run(plain, x)
    got = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), x)
    assert len(got) == len(want)
    for (key, tensor), value in zip(want.items(), got.values(), strict=True):
        torch.testing.assert_close(value, tensor, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def saved_maps(module: nn.Module, x: torch.Tensor) -> tuple[float, set[str]]:
    """Returns what a compiled forward pass saves, in multiples of x, and its ops; Inductor's partitioner divides it."""
    seen: dict[str, Any] = {}

    def forward(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        (outputs,) = next(iter(graph.graph.find_nodes(op="output"))).args
        floats = {n for n in outputs if n is not None and n.meta["val"].is_floating_point()}
        placeholders = set(graph.graph.find_nodes(op="placeholder"))
        seen["values"] = sum(math.prod(n.meta["val"].shape) for n in floats - placeholders - {outputs[0]})
        seen["ops"] = {str(n.target) for n in graph.graph.nodes}
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(module, backend=backend, fullgraph=True)(x).sum().backward()
    return seen["values"] / x.numel(), seen["ops"]


def test_compiled_gate_saves_no_map():
    """The block saves the maps of the block without a gate, and values per channel."""
    x = feature_map((2, C, 16, 16), "channels_last", torch.float64).requires_grad_()
    without, _ = saved_maps(block(None), x)
    kept, ops = saved_maps(accelerated("se"), x)
    assert kept < without + 0.1
    assert not any("visattn_fast" in op for op in ops)


def test_hooks_and_chosen_backends_keep_norm_and_gate_apart():
    """Hooks of gate and norm run, a chosen backend serves, and PyTorch computes a cumulative average."""
    x = feature_map((2, C, 7, 6), dtype=torch.float64)  # large enough for our ops
    hooked: list[str] = []

    def ops(module: nn.Module) -> str:
        names: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            names.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        want = module(x)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(module, backend=backend)(x), want)
        return " ".join(names)

    fast = accelerated("se").eval()
    assert "se_fwd" not in ops(fast)
    with vf.use_backend("cpp"):
        assert "se_fwd" in ops(fast)
    with vf.use_backend("reference"):
        assert "se_fwd" not in ops(fast)
    for inner in ("bn3", "se"):
        fast = accelerated("se").eval()
        fast.get_submodule(inner).register_forward_hook(lambda *_: hooked.append("ran"))
        assert "se_fwd" in ops(fast)
        assert hooked == ["ran", "ran"]
        hooked.clear()
    fast = accelerated("se").eval()
    fast.bn3.momentum = None
    assert "se_fwd" in ops(fast)


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


# A module, and what is done to a layer of it.
ALTERED: dict[str, tuple[Callable[[], nn.Module], str, Callable[[nn.Module], object]]] = {
    "other activation": (MODULES["timm SEModule"], "act", lambda _: nn.GELU()),
    "hook": (MODULES["timm SEModule"], "fc1", _hook),
    "parametrization": (MODULES["timm SEModule"], "fc1", nn.utils.parametrizations.spectral_norm),
    "hook on the pooling": (MODULES["torchvision SqueezeExcitation"], "avgpool", _hook),
    "hook inside a CBAM": (MODULES["timm CbamModule"], "spatial.conv", _hook),
    "other activation of a block": (lambda: block("se"), "act3", lambda _: nn.GELU()),
    "other norm of a block": (lambda: block("cbam", "BasicBlock"), "bn2", lambda _: nn.GroupNorm(4, C).double()),
    "hook on the gate of a block": (lambda: block("eca", "BasicBlock"), "se", _hook),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_layers_leave_one_graph(name):
    """The rule adds guards to a compiled model, and no break."""
    torch._dynamo.reset()
    build, layer, alter = ALTERED[name]
    module, x = build().double().eval(), feature_map((2, C, 12, 11), dtype=torch.float64)
    vf.accelerate(module)
    other = alter(module.get_submodule(layer))
    if isinstance(other, nn.Module):
        module.set_submodule(layer, other)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-9, atol=1e-9)
