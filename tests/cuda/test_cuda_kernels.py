"""The native CUDA kernels on a GPU: results, repeatability, graphs, streams. test_cuda_emulation.py needs no GPU."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import EPILOGUES, LARGE_SHAPES, SHAPE_DTYPES, VIEWS, check, feature_map, needs_dtype, run
from visattn_fast import catalogue
from visattn_fast.backends import backends

BACKEND = backends("cuda")["cuda"]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not BACKEND.available, reason="; ".join(BACKEND.missing)),
]
entries = pytest.mark.parametrize("entry", [catalogue.ENTRIES[n] for n in ("se", "eca", "cbam")], ids=lambda e: e.name)
layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)


@entries
@layouts
@pytest.mark.parametrize(("shape", "dtype"), [*SHAPE_DTYPES, *((s, torch.float32) for s in LARGE_SHAPES)])
def test_results_match_the_reference(entry, layout, shape, dtype):
    needs_dtype("cuda", "cuda", dtype)
    check(entry, feature_map(shape, layout, dtype, "cuda"), "cuda")


@entries
@layouts
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES)
@pytest.mark.parametrize("shape", [(2, 8, 6, 10), (2, 64, 16, 16), (3, 24, 7, 7)], ids=str)
def test_residual_and_activation(entry, layout, shape, with_residual, activation):
    x = feature_map(shape, layout, torch.bfloat16, "cuda")
    residual = feature_map(shape, layout, torch.bfloat16, "cuda", seed=2) if with_residual else None
    check(entry, x, "cuda", residual, activation)


@entries
@layouts
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_of_any_strides(entry, layout, view):
    check(entry, VIEWS[view](feature_map((2, 8, 6, 5), layout, torch.float32, "cuda"), layout), "cuda")


@entries
@layouts
@pytest.mark.parametrize(
    "shape", [(64, 256, 56, 56), (32, 2048, 7, 7), (1, 2048, 150, 150), (300, 64, 28, 28)], ids=str
)
def test_results_match_triton(entry, layout, shape):
    """Each size takes another plan."""
    x = feature_map(shape, layout, torch.bfloat16, "cuda")
    module = entry.pair(shape[1], torch.bfloat16)[0].cuda()
    results = []
    for backend in ("cuda", "triton"):
        with vf.use_backend(backend):
            results.append(run(module, x))
    for name, want in results[1].items():
        torch.testing.assert_close(results[0][name], want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@entries
@layouts
def test_two_streams_give_the_same_bits(entry, layout):
    """A hundred times, while both run the same kernels."""
    shape = (8, 64, 56, 56)
    fast, x = entry.pair(64, torch.float16)[0].cuda(), feature_map(shape, layout, torch.float16, "cuda")
    with vf.use_backend("cuda"), torch.no_grad():
        first, other = fast(x), torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        for _ in range(100):
            with torch.cuda.stream(other):
                beside = fast(x)
            assert torch.equal(fast(x), first)
        other.synchronize()
        assert torch.equal(beside, first)


@entries
@layouts
@pytest.mark.parametrize("shape", [(3, 64, 7, 8), (8, 64, 14, 14), (8, 64, 56, 56)], ids=str)
def test_gradients_have_the_same_bits_again(entry, layout, shape):
    """Small maps sum the weights' gradients in one launch, large ones in a second."""
    fast, x = entry.pair(64, torch.float16)[0].cuda(), feature_map(shape, layout, torch.float16, "cuda")
    with vf.use_backend("cuda"):
        first = run(fast, x)
        for _ in range(20):
            again = run(fast, x)
            assert all(torch.equal(t, again[name]) for name, t in first.items())


@entries
@layouts
@pytest.mark.parametrize(("shape", "launches"), [((8, 64, 14, 14), 2), ((8, 64, 56, 56), 3)], ids=["small", "large"])
def test_number_of_launches(entry, layout, shape, launches):
    """One for each direction; larger maps take another for the weights' gradients. No memory is cleared."""
    fast, x = entry.pair(64, torch.float16)[0].cuda(), feature_map(shape, layout, torch.float16, "cuda")
    with vf.use_backend("cuda"):
        run(fast, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(fast, x)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("visattn" in name for name in names) == launches, names


@layouts
@pytest.mark.parametrize("shape", [(3, 24, 7, 7), (2, 64, 16, 16), (8, 64, 56, 56)], ids=str)
def test_cbam_with_a_bias_of_the_convolution(layout, shape):
    generator, c = torch.Generator().manual_seed(3), shape[1]
    sizes = ((4, c), (c, 4), (1, 2, 7, 7), (1,))
    weights = [(0.3 * torch.randn(size, generator=generator)).cuda().requires_grad_() for size in sizes]
    x = feature_map(shape, layout, torch.float32, "cuda").requires_grad_()
    results = []
    for backend in ("cuda", "reference"):
        with vf.use_backend(backend):
            y = vf.functional.cbam(x, *weights[:3], bias=weights[3], activation="relu")
            results.append((y, *torch.autograd.grad((y * x).sum(), [x, *weights])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * max(1.0, want.abs().max().item()))


@entries
@layouts
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (1, 2048, 150, 150)], ids=str)
def test_captured_graph_replays_on_new_values(entry, layout, shape):
    """One size takes a cluster's kernels, the other those with semaphores."""
    fast = entry.pair(shape[1], torch.float16)[0].cuda()
    static = feature_map(shape, layout, torch.float16, "cuda").requires_grad_()

    def step():
        y = fast(static)
        return y, *torch.autograd.grad(y.float().sum(), [static])

    with vf.use_backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            static.copy_(feature_map(shape, layout, torch.float16, "cuda", seed=5))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@entries
def test_refusal_names_the_kernel(entry):
    """A block's shared memory has no room for so many channels."""
    x = torch.randn(1, 1 << 16, 2, 2, device="cuda")
    module = {"se": vf.FastSE, "cbam": vf.FastCBAM}.get(entry.name, vf.FastECA)
    module = (module(1 << 16) if entry.name == "eca" else module(1 << 16, 1 << 12)).cuda()
    with vf.use_backend("cuda"), pytest.raises(RuntimeError, match=f"{entry.name}_fwd has no CUDA kernel"):
        module(x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@entries
def test_second_device(entry):
    x = feature_map((2, 16, 8, 8), "nchw", torch.float32, "cuda:1")
    module = entry.pair(16)[0].to("cuda:1")
    with vf.use_backend("cuda"):
        y = module(x)
    with vf.use_backend("reference"):
        torch.testing.assert_close(y, module(x))
