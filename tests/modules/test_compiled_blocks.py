"""Blocks of timm and MONAI, accelerated and compiled: the compiler is shown batch norm and gate at once."""

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
from cases import INTERPRETED, run
from outside import library
from visattn_fast.catalogue import feature_map
from visattn_fast.fused.normed import gate_normed_channels

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="nothing of it is a kernel of ours"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
C = 32


def block(attention: str | None, kind: str = "Bottleneck", **options: Any) -> nn.Module:
    """In float64, its batch norms spread over both signs."""
    torch.manual_seed(0)
    if kind == "SEBlock":
        return spread(library("monai.networks.blocks").SEBlock(2, C, 8, 8, C, **options))
    module = getattr(library("timm.models.resnet"), kind)
    gate = library("timm.layers").get_attn(attention)
    return spread(module(C, C // module.expansion, attn_layer=gate, **options))


def spread(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.uniform_(tensor, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.double()


def accelerated(attention: str | None, *arguments: Any, **options: Any) -> nn.Module:
    built = block(attention, *arguments, **options)
    assert len(vf.accelerate(built).swapped) == 2
    return built


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
def test_same(attention, kind, training, options, layout):
    """Result, gradients and running statistics are those of the untouched block in eager mode."""
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
    """What the compiled forward pass hands out beside y, in multiples of x, as Inductor divides it; and its ops."""
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


def test_keeps_nothing_more():
    """Of the gate, no map is kept for the backward pass: what the block without it keeps, and values per channel."""
    x = feature_map((2, C, 16, 16), "channels_last", torch.float64).requires_grad_()
    without, _ = saved_maps(block(None), x)
    kept, ops = saved_maps(accelerated("se"), x)
    assert kept < without + 0.1
    assert not any("visattn_fast" in op for op in ops)


def test_falls_back():
    """Hooks of gate and norm run, a chosen backend serves, and a cumulative average is PyTorch's."""
    x = feature_map((2, C, 7, 6), dtype=torch.float64)  # not so small that an op is left out, too
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


def test_mixed_precision_and_bad_input():
    """Sums in float32, the result in z's dtype, or in the wider one of z and the residual."""
    z = (3 + feature_map((2, C, 5, 4))).bfloat16()
    norm = nn.BatchNorm2d(C)
    options = {"training": True, "momentum": 0.0, "eps": norm.eps}
    weights = (norm.weight, norm.bias, None, None)
    want = norm(z.float()) * 0.25
    y = gate_normed_channels(z, *weights, lambda mean: torch.full_like(mean, 0.25), **options)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.01, atol=1e-3)
    y = gate_normed_channels(z, *weights, lambda mean: torch.full_like(mean, 0.25), residual=want, **options)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, 2 * want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        gate_normed_channels(z[:1, :, :1, :1], *weights, torch.sigmoid, **options)
    with pytest.raises(ValueError, match=r"gate must return shape \[2, 32, 1, 1\]"):
        gate_normed_channels(z, *weights, lambda mean: mean[0], **options)


def test_large_mean():
    """A mean far from zero does not cancel the variance; a constant channel has none, and gets a zero."""
    z = 1000 + feature_map((2, C, 8, 8), dtype=torch.float32)
    z[:, 0] = 7
    norm = nn.BatchNorm2d(C)
    want = nn.BatchNorm2d(C).double()(z.double())
    y = gate_normed_channels(
        z, norm.weight, norm.bias, norm.running_mean, norm.running_var, torch.ones_like,
        training=True, momentum=0.1, eps=norm.eps,
    )  # fmt: skip
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-3)
    assert not y[:, 0].any()
