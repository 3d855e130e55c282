"""Triton's kernels on a GPU: repeatability under load, graphs, streams, mixed-precision training, memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import feature_map, oracle, poisoned, run, within_budget
from visattn_fast import catalogue

pytest.importorskip("triton")
teams = pytest.importorskip("tools.teams", reason="not beside the repository's tools")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)
layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
WITH_KERNELS = [e for e in catalogue.ENTRIES.values() if e.forward_passes]
SHAPE = (8, 64, 56, 56)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    """Makes PyTorch's convolutions inside a module give the same bits each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with vf.use_backend("triton"):
        yield


def make(entry: catalogue.Entry, layout: str, dtype: torch.dtype = torch.float16, shape: tuple[int, ...] = SHAPE):
    """Returns a fused module on the device, and an input."""
    return entry.pair(shape[1], dtype)[0].cuda(), feature_map(shape, layout, dtype, "cuda")


@entries
@layouts
def test_hundred_steps_give_the_same_bits(entry, layout):
    """Another stream keeps the device busy meanwhile."""
    fast, x = make(entry, layout)
    noise, busy = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    with poisoned():  # it makes PyTorch's part of a module, such as padding's gradient, deterministic
        first = run(fast, x)
        for _ in range(100):
            with torch.cuda.stream(busy):
                noise @ noise
            again = run(fast, x)
            assert all(torch.equal(t, again[name]) for name, t in first.items())


@entries
@layouts
def test_captured_graph_replays_on_new_values(entry, layout):
    fast, x = make(entry, layout)
    static = x.clone().requires_grad_()
    inputs = [static, *fast.parameters()]

    def step():
        y = fast(static)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (5, 6):
        with torch.no_grad():
            static.copy_(feature_map(SHAPE, layout, x.dtype, "cuda", seed=seed))
        graph.replay()
        near = 1e-2 if entry.has_torch_layers else 0.0  # the gradient of PyTorch's padding has no fixed order of sums
        torch.testing.assert_close(captured, step(), rtol=near, atol=near)


@entries
def test_kernels_run_on_the_current_stream(entry):
    """They wait for what the stream was given before."""
    fast, x = make(entry, "nchw")
    expected = fast(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = fast(late)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("entry", [e for e in catalogue.ENTRIES.values() if e.epilogue], ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_mixed_precision_step_matches_the_reference(entry, dtype):
    """With autocast, GradScaler and an optimizer."""
    runs = []
    for gate in entry.pair(32):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), gate, nn.Conv2d(32, 8, 1)).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        x = feature_map((4, 3, 32, 32), "nchw", torch.float32, "cuda")
        with torch.autocast("cuda", dtype):
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        runs.append([loss.detach(), *(p.detach() for p in net.parameters())])
    torch.testing.assert_close(*runs, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("entry", [e for e in WITH_KERNELS if not e.has_torch_layers], ids=lambda e: e.name)
@layouts
def test_peak_memory_of_a_step(entry, layout):
    """Forward keeps its result and small maps; backward adds dx and small tensors."""
    fast, x = make(entry, layout, shape=(8, 64, 112, 112))
    x.requires_grad_()
    fast(x).sum().backward()  # compiles
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = fast(x)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= y.nbytes + 0.2 * x.nbytes
    y.backward(torch.ones_like(y))
    assert torch.cuda.max_memory_allocated() - before <= 2 * y.nbytes + 1.4 * x.nbytes


@entries
@layouts
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (32, 2048, 7, 7), (2, 96, 113, 111)])
def test_large_maps_match_the_reference(entry, layout, shape):
    """The interpreter takes too long for these sizes."""
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    fast, plain = (m.cuda() for m in entry.pair(shape[1], torch.bfloat16))
    x = feature_map(shape, layout, torch.bfloat16, "cuda")
    within_budget(run(fast, x), run(plain, x), *oracle(plain, x))


ALL_KERNELS = [(e, resident) for e in WITH_KERNELS for resident in (False, True)[: 1 + e.resident]]


@pytest.mark.parametrize(("entry", "resident"), ALL_KERNELS, ids=lambda p: getattr(p, "name", "resident" * bool(p)))
@layouts
def test_more_than_2_to_31_elements(entry, resident, layout):
    """The last image, past element 2^31, and its gradient are the same as for the image alone.

    In eval mode: batch statistics would let images affect each other.
    """
    shape = (2731, 256, 56, 56)
    needed = (20 if entry.has_torch_layers else 10) * 2 * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=catalogue.LAYOUTS[layout]).normal_()
    module = entry.pair(shape[1], torch.bfloat16)[0].cuda().eval()
    results = []
    for part in (x, x[-1:]):
        part = part.detach().requires_grad_()
        with teams.resident("cuda") if resident else nullcontext():
            y = module(part)
            (dx,) = torch.autograd.grad(y, part, torch.ones_like(y))
        results.append((y[-1].detach().clone(), dx[-1].clone()))
        del y, dx
    for got, alone in zip(*results, strict=True):
        torch.testing.assert_close(got, alone)
