"""What accelerate makes of modules where no gradient is wanted: norms in eval mode are part of the gates by them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from test_compiled_blocks import C, accelerated, spread
from torch import nn

import visattn_fast as vf
from cases import INTERPRETED, feature_map, recorded_ops
from outside import library
from visattn_fast import catalogue
from visattn_fast.ops.library import OPS
from visattn_fast.reference.batch_norm import Norm

layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="swaps classes; what the kernels compute is held elsewhere"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FOLDED = ["channel_mean", "channel_affine"]


def ops_of(module: nn.Module, x: torch.Tensor) -> list[str]:
    """What an accelerated module calls where no gradient is wanted; its result is the original's."""
    plain = copy.deepcopy(module)
    vf.restore(plain)
    with torch.no_grad():
        with recorded_ops() as names:
            y = module(x)
        want = plain(x)
    assert y.stride() == want.stride()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}[x.dtype]
    torch.testing.assert_close(y, want, rtol=tolerance, atol=tolerance)
    return names


@pytest.fixture
def any_size(monkeypatch):
    """Blocks are folded however small they are."""
    normed = __import__("visattn_fast.integrations.normed", fromlist=["normed"])
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
def test_folded(attention, kind, options, layout, any_size):
    """The normed map is never stored, in any dtype."""
    module = accelerated(attention, kind, **options).eval()
    whole = {"se": "se_normed", "eca": "eca_normed", None: "" if options else "se_normed"}.get(attention)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((2, C, 6, 5), (3, C, 61, 33)):
            x = feature_map(shape, layout, dtype)
            assert ops_of(module.to(dtype), x) == ([whole] if whole else FOLDED)


def test_not_folded(any_size):
    """In training, with hooks, where a gradient is wanted, within a chosen reference."""
    module, x = accelerated("se").eval(), feature_map((2, C, 6, 5), "nchw", torch.float64)
    assert ops_of(module, x) == ["se_normed"]
    module.bn3.momentum = None  # of no concern here
    assert ops_of(module, x) == ["se_normed"]
    hooked: list[str] = []
    for inner in ("bn3", "se"):
        hook = module.get_submodule(inner).register_forward_hook(lambda *_: hooked.append("ran"))
        assert ops_of(module, x) == ["se_infer"]
        assert len(hooked) == 2  # with the original's
        hook.remove()
        hooked.clear()
    with vf.use_backend("reference"):
        assert ops_of(module, x) == []
    module.requires_grad_(False)
    for wanted in (module.bn3.weight, module.se.fc1.weight, x):
        wanted.requires_grad_()
        with recorded_ops() as names:
            module(x)
        assert names == ["se_fwd"]
        wanted.requires_grad_(False)
    with recorded_ops() as names:
        module(x)
    assert names == ["se_normed"]
    module.bn3.train()
    with recorded_ops() as names:
        module(x)
    assert names == ["se_infer"]


def test_small_maps():
    """Small maps keep norm and gate, which take fewer calls, where there is no op of both."""
    module = accelerated("ceca", "BasicBlock").eval().float()
    assert ops_of(module, feature_map((2, C, 8, 8), "nchw", torch.float32)) == ["channel_mean", "channel_scale_fwd"]
    assert ops_of(module, feature_map((2, C, 91, 91), "nchw", torch.float32)) == FOLDED


class Overriding(torch.Tensor):
    """A tensor that writes down what is called on it."""

    called: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


def test_overridden():
    """What overrides functions, a tensor's class or a mode, sees an op for inference as it sees every other."""
    module, x = vf.FastSE(C, 4), feature_map((2, C, 3, 3), "nchw", torch.float32)
    with torch.no_grad():
        want, y = module(x), module(x.as_subclass(Overriding))
        assert type(y) is Overriding
        assert torch.equal(y, want)
        assert "visattn_fast.se_infer.default" in Overriding.called
        with torch.device("cpu"):
            assert torch.equal(module(x), want)


def norms() -> tuple[Norm, torch.Tensor]:
    """A norm whose mean is far from zero, and a map of such values."""
    torch.manual_seed(0)
    weight, bias, mean, var = torch.randn(C), torch.randn(C), 30 + torch.randn(C), 0.5 + torch.rand(C)
    return Norm(weight, bias, mean, var, 1e-5), 30 + feature_map((2, C, 9, 7), "nchw", torch.float32)


@pytest.mark.parametrize("gate", [vf.FastSE(C, 4), vf.FastECA(C)], ids=lambda g: type(g).__name__)
def test_norm_before_a_gate(gate):
    """`functional.se` and `functional.eca` take the norm: in one op, or in PyTorch where a gradient is wanted."""
    norm, x = norms()
    function = vf.functional.se if isinstance(gate, vf.FastSE) else vf.functional.eca
    weights = [None if w is None else w.detach() for w in gate.weights()]
    want = function(norm.apply(x), *weights, residual=x, activation="relu")
    with recorded_ops() as names:
        y = function(x, *weights, residual=x, activation="relu", norm=norm)
    assert names == [f"{function.__name__}_normed"]
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    op = getattr(torch.ops.visattn_fast, f"{function.__name__}_normed").default
    codes = (2, 1, 0) if function is vf.functional.se else (2,)
    torch.library.opcheck(op, (x, *norm, *weights, x, *codes), test_utils=("test_schema", "test_faketensor"))
    plain = OPS[op._opname].reference(x, *norm, *weights, x, *codes)
    torch.testing.assert_close(op(x, *norm, *weights, x, *codes), plain, rtol=1e-4, atol=1e-4)
    leaf = x.clone().requires_grad_()
    (fused,) = torch.autograd.grad(function(leaf, *weights, norm=norm).sum(), leaf)
    (exact,) = torch.autograd.grad(function(norm.apply(leaf), *weights).sum(), leaf)
    torch.testing.assert_close(fused, exact)
    with pytest.raises(ValueError, match=r"running_mean must have shape \[32\], got \[3\]"):
        function(x, *weights, norm=norm._replace(running_mean=torch.zeros(3)))


@pytest.mark.parametrize("gate", [vf.FastSE(C), vf.FastECA(C), vf.FastCBAM(C)], ids=lambda g: type(g).__name__)
def test_gates_compiled(gate):
    """In one graph, as in eager mode."""
    x = feature_map((2, C, 7, 6), "nchw", torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(gate, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(y, gate(x), rtol=1e-6, atol=1e-6)


def cbam(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    module = spread(library("timm.layers.cbam").CbamModule(C, **options)).eval()
    vf.accelerate(module)
    return module


STEPS = ("pool_pixels", "pool_channels", "map_conv", "twofold_scale")


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cbam_is_one_op(dtype, layout):
    """timm's norm is part of the convolution; maxima that are equal, too."""
    for x in (feature_map((2, C, 7, 6), layout, dtype), feature_map((2, C, 7, 6), layout, dtype).relu().round()):
        x = x.contiguous(memory_format=catalogue.LAYOUTS[layout])
        assert ops_of(cbam(spatial_kernel_size=3).to(dtype), x) == ["cbam_fwd"]


def test_cbam_bias_of_the_convolution():
    module = cbam()
    module.spatial.conv.conv.bias = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    module.spatial.conv.bn.affine, module.spatial.conv.bn.weight, module.spatial.conv.bn.bias = False, None, None
    assert ops_of(module, feature_map((2, C, 7, 6), "nchw", torch.float64)) == ["cbam_fwd"]


def test_cbam_in_steps():
    """Where the norm is in training, other layers stand inside, hooks wait, or a gradient is wanted."""
    x = feature_map((2, C, 7, 6), "nchw", torch.float64)
    others: list[dict[str, Any]] = [{"act_layer": nn.SiLU}, {"mlp_bias": True}, {"gate_layer": "hard_sigmoid"}]
    for options in others:
        assert ops_of(cbam(**options), x) == list(STEPS)
    module = cbam()
    hooked = module.spatial.conv.bn.register_forward_hook(lambda *_: None)
    assert ops_of(module, x) == list(STEPS)
    hooked.remove()
    with recorded_ops() as names:
        module(x)  # its parameters want one
    assert names == list(STEPS)
    module.spatial.conv.bn.train()
    assert ops_of(module, x) == list(STEPS)


def test_cbam_in_a_block_and_compiled():
    """Compiled it is one op, too, and a block's gate adds the shortcut."""
    module, x = accelerated("cbam", "BasicBlock").eval(), feature_map((2, C, 7, 6), "nchw", torch.float64)
    assert ops_of(module, x) == ["cbam_fwd"]
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.extend(str(n.target) for n in graph.graph.nodes if "visattn_fast" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        y, want = torch.compile(module, fullgraph=True, backend=backend)(x), module(x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    assert graphs == ["visattn_fast.cbam_fwd.default"]
