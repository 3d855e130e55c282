"""torch.compile over the fused modules: one graph, dynamic sizes, tiny maps, checkpoints, layouts."""

from __future__ import annotations

import re

import pytest
import torch
import torch.utils.checkpoint
from torch._dynamo import compiled_autograd
from torch._inductor.utils import fresh_cache, run_and_get_code

import visattn_fast as vf
from cases import entries, feature_map
from visattn_fast import catalogue, reference


@entries
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_module_is_one_graph_and_matches_eager(entry, dynamic):
    """A compiled module is one graph, gradients included; with dynamic sizes it is compiled once, by Inductor.

    Modules in eval mode are not compiled by Inductor, as their training forms are. Neither are those that are mostly
    PyTorch's convolutions, which take a minute each.
    """
    torch._dynamo.reset()
    with vf.use_backend("auto"):
        pass  # the first choice in a process has graphs compiled again, once
    fast, _ = entry.pair(16)
    served = "reference" if entry.name == "sk" else "auto"  # sk is the reference when compiled
    quick = not dynamic or entry.name in ("gam", "sk") or not entry.training
    backend = "aot_eager" if quick else "inductor"
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic, backend=backend)
    # Inductor computes batch norms its own way.
    own_norms = entry.has_torch_layers or entry.name == "triplet_attention"
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if own_norms else {}
    # No map is so small that the reference serves.
    shapes = [(2, 16, 6, 5), (3, 16, 8, 9), (5, 16, 7, 6)] if dynamic else [(2, 16, 15, 14)]
    for index, shape in enumerate(shapes):
        x = feature_map(shape, "nchw", torch.float32).requires_grad_()
        # Inductor compiles PyTorch's convolutions again for each size.
        with torch._dynamo.config.patch(error_on_recompile=index > 0 and not entry.has_torch_layers):
            got = torch.autograd.grad(compiled(x).square().sum(), [x, *fast.parameters()])
            y = compiled(x)
        with vf.use_backend(served):
            torch.testing.assert_close(y, fast(x), **tolerance)
            want = torch.autograd.grad(fast(x).square().sum(), [x, *fast.parameters()])
        torch.testing.assert_close(got, want, **tolerance)


def graph_ops(graphs):
    """Returns a backend of torch.compile that appends the names of each graph's calls to ``graphs``."""

    def backend(graph, _):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return backend


@pytest.mark.parametrize(
    ("name", "most"), [("se", 25), ("gam", 49), ("split_attention", 49), ("nam", 196), ("simam", 196), ("soca", 196)]
)
def test_reference_serves_compiled_tiny_maps(name, most):
    """The reference serves maps of a static tiny size, unless a backend is chosen; dynamic sizes get the op."""
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


def test_compiled_checkpoint_gives_the_same_gradients():
    """A checkpoint inside torch.compile gives the gradients of the plain call; without gradients nothing is saved."""
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # PyTorch reads it itself
@pytest.mark.parametrize("name", ["se", "cbam"])
def test_compiled_autograd_is_one_graph_with_the_same_bits(name):
    """The backward pass of an eager forward pass is traced as one graph, and gives the same bits."""
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
def test_compile_modes_match_reference(mode):
    torch._dynamo.reset()
    fast, plain = catalogue.ENTRIES["eca"].pair(16)
    x = feature_map((2, 16, 9, 8), "nchw", torch.float32).requires_grad_()
    compiled = torch.compile(fast, fullgraph=True, mode=mode)
    got, want = (torch.autograd.grad(f(x).square().sum(), [x, *f.parameters()]) for f in (compiled, plain))
    torch.testing.assert_close(got, want)


def test_gate_keeps_the_layout_of_compiled_convolutions():
    """Inductor runs these convolutions in channels_last, and copies no map for the gate between them."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), vf.FastSE(16), torch.nn.Conv2d(16, 3, 1))
    x = feature_map((2, 3, 8, 7), "nchw", torch.float32)
    with torch.no_grad(), fresh_cache():  # the cache may hold code of the same ops with other tags
        y, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        torch.testing.assert_close(y, model(x))
    result = re.search(r"se_fwd\.default\(.*?assert_\w+\(\w+, (\(.*?\), \(.*?\))", code, re.DOTALL)
    assert result
    assert result[1] == "(2, 16, 6, 5), (480, 1, 80, 16)", code


def test_compiled_epilogue_follows_the_chosen_backend():
    """Residual and activation compile too, and compiled code notices a change of backend."""
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


@pytest.mark.parametrize("gate", [vf.FastSE(32), vf.FastECA(32), vf.FastCBAM(32)], ids=lambda g: type(g).__name__)
def test_compiled_inference_matches_eager(gate):
    x = feature_map((2, 32, 7, 6), "nchw", torch.float32)
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(gate, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(y, gate(x), rtol=1e-6, atol=1e-6)
