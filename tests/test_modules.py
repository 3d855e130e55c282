"""The modules as users handle them: constructors, state_dict, copies, hooks, torch.compile, bad input."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import visattn_fast as vf
from cases import feature_map
from visattn_fast import catalogue, reference

entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)

KEYS = {
    "se": {"fc.0.weight": (2, 32), "fc.2.weight": (32, 2)},
    "eca": {"conv.weight": (1, 1, 3)},
    "cbam": {
        "channelattention.fc1.weight": (4, 32, 1, 1),
        "channelattention.fc2.weight": (32, 4, 1, 1),
        "spatialattention.conv1.weight": (1, 2, 7, 7),
    },
    "channel_attention": {"fc1.weight": (4, 32, 1, 1), "fc2.weight": (32, 4, 1, 1)},
    "spatial_attention": {"conv1.weight": (1, 2, 7, 7)},
}


@entries
def test_state_dict(entry):
    """The documented keys and shapes, the same in both classes, loadable both ways through a file."""
    for source, target in (entry.pair(32), entry.pair(32, seed=1)[::-1]):
        assert {k: tuple(v.shape) for k, v in source.state_dict().items()} == KEYS[entry.name]
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
    x = feature_map((1, 32, 5, 5), "nchw", torch.float32)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))
        for p in twin.parameters():
            p.data.add_(1)
        assert not torch.equal(twin(x), fast(x))


@entries
def test_train_eval_and_hooks(entry):
    """Mode changes nothing; hooks on the module itself run."""
    fast, _ = entry.pair(32)
    x = feature_map((1, 32, 5, 5), "nchw", torch.float32).requires_grad_()
    seen = []
    fast.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    fast.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    y = fast.eval()(x)
    fast.train()(x).sum().backward()
    assert torch.equal(y, fast(x))
    assert seen == ["forward", "forward", "backward", "forward"]


@entries
def test_channels_last_weights(entry):
    """``module.to(memory_format=channels_last)`` makes the 7x7 weight strided; the result stays."""
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 6, 5), "channels_last", torch.float32)
    before = fast(x)
    torch.testing.assert_close(fast.to(memory_format=torch.channels_last)(x), before)
    fast(x).sum().backward()


@entries
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(entry, dynamic):
    """One graph, no break, gradients included; with dynamic sizes no recompilation either."""
    torch._dynamo.reset()
    fast, _ = entry.pair(16)
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic)
    shapes = [(2, 16, 6, 5), (3, 16, 8, 9), (5, 16, 7, 6)] if dynamic else [(2, 16, 6, 5)]
    for index, shape in enumerate(shapes):
        x = feature_map(shape, "nchw", torch.float32).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            results = [torch.autograd.grad(f(x).square().sum(), [x, *fast.parameters()]) for f in (compiled, fast)]
            torch.testing.assert_close(compiled(x), fast(x))
        torch.testing.assert_close(*results)


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


X = torch.randn(2, 32, 4, 4)
BAD_CALLS = {
    "rank": (lambda m: m(X[0]), ValueError, r"x must have shape \[N, C, H, W\], got 3 dimensions: \(32, 4, 4\)"),
    "channels": (lambda m: m(X[:, :8]), ValueError, r"x must have 32 channels, .*got shape \(2, 8, 4, 4\)"),
    "integer": (lambda m: m(X.long()), TypeError, r"x must have a floating-point dtype, got torch.int64"),
    "complex": (lambda m: m(X.to(torch.cfloat)), TypeError, r"x must have a floating-point dtype, got torch.complex64"),
    "list": (lambda m: m([1.0]), TypeError, r"x must be a torch.Tensor, got list"),
    "no pixels": (
        lambda m: m(X[..., :0]),
        ValueError,
        r"at least one channel and one pixel, got shape \(2, 32, 4, 0\)",
    ),
    "device": (lambda m: m.to("meta")(X), ValueError, r"must be on the device of x, cpu, got meta"),
}
BAD_EPILOGUES = {
    "activation": (lambda m: m(X, activation="gelu"), ValueError, r"activation must be one of .*got 'gelu'"),
    "shape": (lambda m: m(X, residual=X[:1]), ValueError, r"residual must have the shape of x, .*got \(1, 32, 4, 4\)"),
    "dtype": (
        lambda m: m(X, residual=X.int()),
        TypeError,
        r"residual must have a floating-point dtype, got torch.int32",
    ),
    "device": (
        lambda m: m(X, residual=X.to("meta")),
        ValueError,
        r"residual must be on the device of x, cpu, got meta",
    ),
}
BAD_ARGUMENTS = [
    (lambda r: r.SE(8), r"channels must be at least reduction=16, got 8"),
    (lambda r: r.SE(0), r"channels must be a positive int, got 0"),
    (lambda r: r.SE(32, reduction=-1), r"reduction must be a positive int, got -1"),
    (lambda r: r.SE(32.0), r"channels must be a positive int, got 32.0"),
    (lambda r: r.ECA(0), r"channels must be a positive int, got 0"),
    (lambda r: r.ECA(8, gamma=0), r"gamma must be a positive int, got 0"),
    (lambda r: r.ECA(8, kernel_size=4), r"kernel_size must be odd, .*got 4"),
    (lambda r: r.ECA(8, kernel_size=-3), r"kernel_size must be a positive int, got -3"),
    (lambda r: r.ChannelAttention(4), r"channels must be at least reduction=8, got 4"),
    (lambda r: r.SpatialAttention(4), r"kernel_size must be 3 or 7, got 4"),
    (lambda r: r.CBAM(32, kernel_size=5), r"kernel_size must be 3 or 7, got 5"),
]


@entries
@pytest.mark.parametrize("which", [0, 1], ids=["fast", "reference"])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(entry, which, name):
    call, error, message = BAD_CALLS[name]
    if name == "channels" and entry.name == "spatial_attention":
        pytest.skip("takes any number of channels")
    with pytest.raises(error, match=message):
        call(entry.pair(32)[which])


@pytest.mark.parametrize("entry", [e for e in catalogue.ENTRIES.values() if e.epilogue], ids=lambda e: e.name)
@pytest.mark.parametrize("name", BAD_EPILOGUES)
def test_bad_epilogues(entry, name):
    call, error, message = BAD_EPILOGUES[name]
    with pytest.raises(error, match=message):
        call(entry.pair(32)[0])


class _Fast:
    SE, ECA, CBAM = vf.FastSE, vf.FastECA, vf.FastCBAM
    ChannelAttention, SpatialAttention = vf.FastChannelAttention, vf.FastSpatialAttention


@pytest.mark.parametrize("classes", [_Fast, reference], ids=["fast", "reference"])
@pytest.mark.parametrize(("construct", "message"), BAD_ARGUMENTS)
def test_bad_arguments(classes, construct, message):
    with pytest.raises(ValueError, match=message):
        construct(classes)


BAD_WEIGHTS = [
    (
        lambda f: f.se(X, torch.ones(4, 32), None, torch.ones(32, 5), None),
        r"w2 must have shape \[32, 4\], got \[32, 5\]",
    ),
    (lambda f: f.se(X, torch.ones(4), None, torch.ones(32, 4), None), r"w1 must have shape \[R, C\] .*got \[4\]"),
    (
        lambda f: f.se(X, torch.ones(4, 32), torch.ones(5), torch.ones(32, 4), None),
        r"b1 must have shape \[4\], got \[5\]",
    ),
    (
        lambda f: f.channel_attention(X, torch.ones(4, 32, 3, 3), torch.ones(32, 4, 1, 1)),
        r"w1 must have shape \[4, 32\], got \[4, 32, 3, 3\]",
    ),
    (lambda f: f.eca(X, torch.ones(1, 1, 4)), r"kernel size of weight must be odd, .*got 4"),
    (lambda f: f.eca(X, torch.ones(3)), r"weight must have shape \[1, 1, k\], got \[3\]"),
    (lambda f: f.spatial_attention(X, torch.ones(1, 2, 4, 4)), r"kernel size of wconv must be odd, .*got 4"),
    (
        lambda f: f.spatial_attention(X, torch.ones(1, 3, 7, 7)),
        r"wconv must have shape \[1, 2, 7, 7\], got \[1, 3, 7, 7\]",
    ),
    (
        lambda f: f.spatial_attention(X, torch.ones(1, 2, 3, 7)),
        r"wconv must have shape \[1, 2, 7, 7\], got \[1, 2, 3, 7\]",
    ),
]


@pytest.mark.parametrize("functions", [vf.functional, reference], ids=["fast", "reference"])
@pytest.mark.parametrize(("call", "message"), BAD_WEIGHTS)
def test_bad_weights(functions, call, message):
    with pytest.raises(ValueError, match=message):
        call(functions)
