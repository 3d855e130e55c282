"""The modules as users handle them: constructors, state_dict, copies, hooks, torch.compile, bad input."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.utils.checkpoint
from torch._dynamo import compiled_autograd
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.utils import parametrize

import visattn_fast as vf
from cases import feature_map
from visattn_fast import catalogue, reference

entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def batch_norm(name, channels):
    return {f"{name}.{key}": (channels,) for key in BATCH_NORM} | {f"{name}.num_batches_tracked": ()}


KEYS = {
    "S2MLPv2": {
        "mlp1.weight": (96, 32),
        "mlp1.bias": (96,),
        "mlp2.weight": (32, 32),
        "mlp2.bias": (32,),
        "split_attention.mlp1.weight": (32, 32),
        "split_attention.mlp2.weight": (96, 32),
    },
    "SK": {
        **{f"convs.{i}.0.weight": (32, 32, 3, 3) for i in range(2)},
        **batch_norm("convs.0.1", 32),
        **batch_norm("convs.1.1", 32),
        "fc.0.weight": (32, 32, 1, 1),
        **batch_norm("fc.1", 32),
        **{f"fcs.{i}.weight": (32, 32, 1, 1) for i in range(2)},
        **{f"fcs.{i}.bias": (32,) for i in range(2)},
    },
    "GAM": {
        "linear1.weight": (8, 32),
        "linear1.bias": (8,),
        "linear2.weight": (32, 8),
        "linear2.bias": (32,),
        "conv1.weight": (8, 32, 7, 7),
        "conv1.bias": (8,),
        **batch_norm("norm1", 8),
        "conv2.weight": (32, 8, 7, 7),
        "conv2.bias": (32,),
        **batch_norm("norm2", 32),
    },
    "SelfAttention2d": {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    },
    "CrissCross": {
        "query_conv.weight": (4, 32, 1, 1),
        "query_conv.bias": (4,),
        "key_conv.weight": (4, 32, 1, 1),
        "key_conv.bias": (4,),
        "value_conv.weight": (32, 32, 1, 1),
        "value_conv.bias": (32,),
        "gamma": (1,),
    },
    "SOCA": {
        "conv_du.0.weight": (4, 32, 1, 1),
        "conv_du.0.bias": (4,),
        "conv_du.2.weight": (32, 4, 1, 1),
        "conv_du.2.bias": (32,),
    },
    "WindowAttention2d": {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
        "relative_position_bias_table": (169, 2),
    },
    "SE": {"fc.0.weight": (2, 32), "fc.2.weight": (32, 2)},
    "scSE": {
        "cSE.1.weight": (2, 32, 1, 1),
        "cSE.1.bias": (2,),
        "cSE.3.weight": (32, 2, 1, 1),
        "cSE.3.bias": (32,),
        "sSE.0.weight": (1, 32, 1, 1),
        "sSE.0.bias": (1,),
    },
    "LocalAttention": {
        "channel_attention.1.weight": (4, 32, 1, 1),
        "channel_attention.1.bias": (4,),
        "channel_attention.3.weight": (32, 4, 1, 1),
        "channel_attention.3.bias": (32,),
        "spatial_attention.0.weight": (4, 32, 1, 1),
        "spatial_attention.0.bias": (4,),
        "spatial_attention.2.weight": (1, 4, 1, 1),
        "spatial_attention.2.bias": (1,),
    },
    "ECA": {"conv.weight": (1, 1, 3)},
    "CBAM": {
        "channelattention.fc1.weight": (4, 32, 1, 1),
        "channelattention.fc2.weight": (32, 4, 1, 1),
        "spatialattention.conv1.weight": (1, 2, 7, 7),
    },
    "CoordAtt": {
        "conv1.weight": (8, 32, 1, 1),
        "conv1.bias": (8,),
        **{f"bn1.{name}": (8,) for name in ("weight", "bias", "running_mean", "running_var")},
        "bn1.num_batches_tracked": (),
        **{f"conv_{axis}.weight": (32, 8, 1, 1) for axis in "hw"},
        **{f"conv_{axis}.bias": (32,) for axis in "hw"},
    },
    "ChannelAttention": {"fc1.weight": (4, 32, 1, 1), "fc2.weight": (32, 4, 1, 1)},
    "SpatialAttention": {"conv1.weight": (1, 2, 7, 7)},
    "NAM": {
        **{f"bn2.{name}": (32,) for name in ("weight", "bias", "running_mean", "running_var")},
        "bn2.num_batches_tracked": (),
    },
    "SimAM": {},
    "ShuffleAttention": {
        **dict.fromkeys(("cweight", "cbias", "sweight", "sbias"), (1, 2, 1, 1)),
        "gn.weight": (2,),
        "gn.bias": (2,),
    },
}


@entries
def test_state_dict(entry):
    """The documented keys and shapes, the same in both classes, loadable both ways through a file."""
    for source, target in (entry.pair(32), entry.pair(32, seed=1)[::-1]):
        assert {k: tuple(v.shape) for k, v in source.state_dict().items()} == KEYS[entry.reference.__name__]
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
        x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
        torch.testing.assert_close(source(x), target(x))


def test_constructors():
    assert vf.FastSE(32, bias=True).state_dict().keys() == {f"fc.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    sizes = [reference.ECA(c).conv.weight.shape[2] for c in (1, 8, 16, 64, 128, 256, 512, 1024, 2048)]
    assert sizes == [1, 3, 3, 3, 5, 5, 5, 5, 7]  # int(abs((log2 C + 1) / 2)), plus one if even
    assert reference.ECA(64, kernel_size=9).conv.weight.shape[2] == 9
    assert vf.FastCBAM(32, 4, 3).spatialattention.conv1.weight.shape == (1, 2, 3, 3)
    assert repr(vf.FastSE(32)).startswith("FastSE(\n  channels=32, reduction=16")


@entries
def test_copies(entry):
    """deepcopy and pickle give modules of their own with equal results."""
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))
        for p in twin.parameters():
            p.data.add_(1)
        assert not torch.equal(twin(x), fast(x)) or not list(twin.parameters())


@entries
def test_train_eval_and_hooks(entry):
    """Without a batch norm the mode changes nothing; hooks on the module itself run."""
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32).requires_grad_()
    seen = []
    fast.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    fast.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    y = fast.eval()(x)
    fast.train()(x).sum().backward()
    assert torch.equal(y, fast(x)) or list(fast.buffers())
    assert seen == ["forward", "forward", "backward", "forward"]


class Doubled(torch.nn.Module):
    def forward(self, w):
        return 2 * w


@entries
def test_parameters_elsewhere(entry):
    """Parameters that are parametrized, or plain attributes as a replica's are, are read all the same."""
    fast, twin = entry.pair(32)[0].eval(), entry.pair(32)[0].eval()
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
    expected = fast(x)
    for module in [*fast.modules()]:
        for name, value in [*module.named_parameters(recurse=False)]:
            value.data /= 2
            parametrize.register_parametrization(module, name, Doubled())
    torch.testing.assert_close(fast(x), expected)
    for module in twin.modules():
        for name, value in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            setattr(module, name, value.detach())
    torch.testing.assert_close(twin(x), expected)


@entries
def test_channels_last_weights(entry):
    """``module.to(memory_format=channels_last)`` makes the 7x7 weight strided; the result stays."""
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 6, 5), "channels_last", torch.float32)
    before = fast(x)
    torch.testing.assert_close(fast.to(memory_format=torch.channels_last)(x), before)
    fast(x.requires_grad_()).sum().backward()


@entries
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(entry, dynamic):
    """One graph, no break, gradients included; with dynamic sizes no recompilation either, and Inductor's code.

    Not where it would be the module's in training again, or for most PyTorch's own convolutions, a minute a module.
    """
    torch._dynamo.reset()
    fast, plain = entry.pair(16)
    eager = plain if entry.name == "sk" else fast  # which is the reference, compiled
    quick = not dynamic or entry.name in ("gam", "sk") or not entry.training
    backend = "aot_eager" if quick else "inductor"
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic, backend=backend)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if entry.has_torch_layers else {}  # Inductor has batch norms of its own
    shapes = (
        [(2, 16, 6, 5), (3, 16, 8, 9), (5, 16, 7, 6)] if dynamic else [(2, 16, 15, 14)]
    )  # none so small that the reference serves
    for index, shape in enumerate(shapes):
        x = feature_map(shape, "nchw", torch.float32).requires_grad_()
        # Inductor compiles PyTorch's own convolutions anew for another size.
        with torch._dynamo.config.patch(error_on_recompile=index > 0 and not entry.has_torch_layers):
            pairs = (compiled, fast), (eager, eager)
            results = [torch.autograd.grad(f(x).square().sum(), [x, *m.parameters()]) for f, m in pairs]
            torch.testing.assert_close(compiled(x), eager(x), **tolerance)
        torch.testing.assert_close(*results, **tolerance)


def graph_ops(graphs):
    """A backend of torch.compile that appends to ``graphs`` the names of what each graph calls."""

    def backend(graph, _):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return backend


@pytest.mark.parametrize(
    ("name", "most"), [("se", 25), ("gam", 49), ("split_attention", 49), ("nam", 196), ("simam", 196), ("soca", 196)]
)
def test_compiled_tiny_maps_are_the_references(name, most):
    """Where they are known to be tiny: a chosen backend stands, and sizes that may vary get the op, in one graph."""
    fast, plain = catalogue.ENTRIES[name].pair(16)

    def compiled(sizes, choice="auto", dynamic=()):
        torch._dynamo.reset()
        graphs = []
        function = torch.compile(fast, fullgraph=True, backend=graph_ops(graphs))
        with torch.no_grad(), vf.use_backend(choice):
            for size in sizes:
                x = feature_map((2, 16, *size), "nchw", torch.float32)
                for dim in dynamic:
                    torch._dynamo.mark_dynamic(x, dim)
                torch.testing.assert_close(function(x), plain(x))
        return ["visattn_fast" in graph for graph in graphs]

    assert compiled([(1, most)]) == [False]
    assert compiled([(1, most + 1)]) == [True]
    assert compiled([(1, most)], choice="cpp") == [True]
    assert compiled([(2, 3), (15, 14), (3, 40)], dynamic=(2, 3)) == [True]


def test_compiled_under_a_checkpoint():
    """Recomputed inside of torch.compile, the gradients are the same; without gradients nothing is kept."""
    fast, _ = catalogue.ENTRIES["cbam"].pair(16)
    x = feature_map((2, 16, 9, 8), "nchw", torch.float32).requires_grad_()

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(fast, x.sin(), use_reentrant=False).cos()

    torch._dynamo.reset()
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    got, want = (
        torch.autograd.grad(f(x).square().sum(), [x, *fast.parameters()])
        for f in (compiled, lambda x: fast(x.sin()).cos())
    )
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not compiled(x).requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch's own asking
@pytest.mark.parametrize("name", ["se", "cbam"])
def test_compiled_autograd(name):
    """The backward pass of an eager forward pass, traced as a graph of its own: one graph, the same bits."""
    fast, _ = catalogue.ENTRIES[name].pair(16)
    x = feature_map((2, 16, 9, 8), "nchw", torch.float32).requires_grad_()

    def gradients():
        fast.zero_grad()
        x.grad = None
        fast(x, residual=x, activation="silu").square().sum().backward()
        return [x.grad, *(p.grad for p in fast.parameters())]

    want, graphs = gradients(), []
    with compiled_autograd._enable(torch.compile(backend=graph_ops(graphs), fullgraph=True)):
        got = gradients()
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert len(graphs) == 1, graphs
    assert f"{name}_bwd" in graphs[0]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compile_modes(mode):
    torch._dynamo.reset()
    fast, plain = catalogue.ENTRIES["eca"].pair(16)
    x = feature_map((2, 16, 9, 8), "nchw", torch.float32).requires_grad_()
    compiled = torch.compile(fast, fullgraph=True, mode=mode)
    got, want = (torch.autograd.grad(f(x).square().sum(), [x, *f.parameters()]) for f in (compiled, plain))
    torch.testing.assert_close(got, want)


def test_compiled_convolutions_choose_the_layout():
    """Inductor runs convolutions in channels_last here; the gate between them is not to make it copy maps back."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), vf.FastSE(16), torch.nn.Conv2d(16, 3, 1))
    x = feature_map((2, 3, 8, 7), "nchw", torch.float32)
    with torch.no_grad(), fresh_cache():  # which knows code of the same ops with other tags
        y, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        torch.testing.assert_close(y, model(x))
    result = re.search(r"se_fwd\.default\(.*?assert_size_stride\(\w+, (\(.*?\), \(.*?\))", code, re.DOTALL)
    assert result
    assert result[1] == "(2, 16, 6, 5), (480, 1, 80, 16)", code


def test_compile_epilogue_and_backend_choice():
    """Residual and activation compile too, and a change of backend is noticed by the compiled code."""
    torch._dynamo.reset()
    fast, plain = catalogue.ENTRIES["cbam"].pair(16)
    compiled = torch.compile(lambda x, r: fast(x, residual=r, activation="silu"), fullgraph=True)
    x, r = feature_map((2, 16, 6, 5), "nchw", torch.float32), feature_map((2, 16, 6, 5), "nchw", torch.float32, seed=1)
    expected = reference.epilogue(plain(x), r, "silu")
    torch.testing.assert_close(compiled(x, r), expected)
    with vf.use_backend("reference"):
        torch.testing.assert_close(compiled(x, r), expected)
    with vf.use_backend("cuda"), pytest.raises(Exception, match="cannot serve"):
        compiled(x, r)
