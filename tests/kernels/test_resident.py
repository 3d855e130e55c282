"""The Triton kernels of SE and ECA that keep an image on the chip, whose programs wait for each other.

The interpreter runs the programs in turns, in random orders (tools/teams.py). test_traffic.py counts what they move.
"""

from __future__ import annotations

import importlib
import re
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch

import visattn_fast as vf
from cases import DTYPES, INTERPRETED, TARGETS, check, feature_map, run
from visattn_fast import catalogue

pytest.importorskip("triton")
teams = pytest.importorskip("tools.teams", reason="not beside the repository's tools")
compiled = pytest.importorskip("tools.compiled")
layouts, switch, kernels, resident_se, resident_eca = (
    importlib.import_module(f"visattn_fast.kernels.{name}")
    for name in (
        "core.layout",
        *(f"experimental.{name}" for name in ("resident", "team", "resident_se", "resident_eca")),
    )
)

DEVICES = [device for device, backend in TARGETS if backend == "triton"]
ENTRIES = [entry for entry in catalogue.ENTRIES.values() if entry.resident]
# Teams of several programs along the channels, along the pixels, along both; one program; rows that are not aligned.
SHAPES = [(2, 72, 5, 8), (2, 6, 20, 28), (1, 3, 5, 5), (1, 33, 7, 9)]
NEEDS_DEVICE = pytest.mark.skip(reason="needs a GPU or TRITON_INTERPRET=1")
on_devices = pytest.mark.parametrize("device", DEVICES or [pytest.param("none", marks=NEEDS_DEVICE)])
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="compiles: needs TRITON_INTERPRET unset")
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
formats = pytest.mark.parametrize("layout", catalogue.LAYOUTS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes small images need teams, too."""
    monkeypatch.setattr(kernels, "RESIDENT_TILE", 2048)


@pytest.fixture
def resident(small_tiles, device):
    with ExitStack() as stack:
        stack.enter_context(teams.resident(device))
        if INTERPRETED:
            stack.enter_context(teams.together())
        yield


def team_of(shape, layout, itemsize=2, multiprocessors=132):
    where = layouts.canonical(torch.empty(shape, device="meta", memory_format=catalogue.LAYOUTS[layout]))[1]
    return kernels.fitting_team(where, itemsize, multiprocessors)


@formats
def test_teams(layout, small_tiles):
    """The shapes above give the teams that the comment tells; every element has its program."""
    found = [team_of(shape, layout) for shape in SHAPES]
    assert [team.size > 1 for team in found] == [True, True, False, found[3].size > 1]
    assert {(team.blocks_c > 1, team.blocks_p > 1) for team in found} >= {(False, False), (layout == "nchw", True)}
    for team, (_, C, H, W) in zip(found, SHAPES, strict=True):
        assert team.blocks_c * team.tile.BLOCK_C >= C > (team.blocks_c - 1) * team.tile.BLOCK_C
        assert team.blocks_p * team.tile.BLOCK_P >= H * W > (team.blocks_p - 1) * team.tile.BLOCK_P


@formats
def test_no_larger_than_the_device(layout):
    """A team is no larger than the device: it would wait for ever."""
    for shape in ((64, 256, 56, 56), (1, 2048, 150, 150), (1, 3, 3000, 3000)):
        sizes = [team.size if (team := team_of(shape, layout, multiprocessors=m)) else None for m in (1, 50, 132)]
        assert all(size is None or size <= m for size, m in zip(sizes, (1, 50, 132), strict=True))
        assert sizes[0] is None
    assert team_of((64, 256, 56, 56), layout)
    assert not team_of((1, 2048, 150, 150), layout)


def test_documented_teams():
    """docs/internals/cuda.md has a table of team sizes."""
    page = (Path(__file__).parents[2] / "docs" / "internals" / "cuda.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+x\d+x\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for image, *sizes in rows:
        shape = (8, *map(int, image.split("x")))
        assert [team_of(shape, layout, multiprocessors=1000).size for layout in catalogue.LAYOUTS] == list(
            map(int, sizes)
        )


@on_devices
@entries
def test_chosen_by_the_switch_alone(entry, device, monkeypatch):
    calls = []
    monkeypatch.setattr(resident_se, "team_of", lambda *args: calls.append(args))  # no team: streams
    monkeypatch.setattr(resident_eca, "team_of", lambda *args: calls.append(args))
    x, fast = feature_map((2, 16, 5, 8), "nchw", torch.float32, device), entry.pair(16)[0].to(device)
    with vf.use_backend("triton"):
        for used in (0, 2, 2):  # forward and backward
            with teams.resident(device) if used > len(calls) else nullcontext():
                run(fast, x)
            assert len(calls) == used


def test_not_before_kernels_are_registered():
    with pytest.raises(RuntimeError, match="has no kernel for XPU yet"), switch.resident("XPU"):
        pass


@on_devices
@entries
@formats
@pytest.mark.parametrize(
    ("shape", "dtype", "with_residual", "activation"),
    [
        *((SHAPES[0], dtype, False, None) for dtype in DTYPES),
        *((SHAPES[1], dtype, True, "silu") for dtype in (torch.float32, torch.bfloat16)),
        (SHAPES[2], torch.float32, False, "relu"),
        *((SHAPES[3], dtype, True, "relu") for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=lambda p: "x".join(map(str, p)) if isinstance(p, tuple) else str(p),
)
def test_parity(entry, layout, shape, dtype, with_residual, activation, device, resident):
    x = feature_map(shape, layout, dtype, device)
    check(entry, x, "triton", feature_map(shape, layout, dtype, device, seed=2) if with_residual else None, activation)


@on_devices
@formats
@pytest.mark.parametrize(("hidden", "gate"), [("relu", "hard_sigmoid"), ("silu", "sigmoid")])
def test_flavours(layout, hidden, gate, device, resident):
    """Other hidden units and biases, weights of another dtype and a sliced x give the same as streaming."""
    x = feature_map((2, 144, 5, 8), layout, torch.bfloat16, device)[:, :72].requires_grad_()
    weights = [(torch.randn(s) / s[-1] ** 0.5).to(device) for s in ((18, 72), (18,), (72, 18), (72,))]
    results = []
    for on_chip in (True, False):
        with vf.use_backend("triton"), teams.resident(device) if on_chip else nullcontext():
            inputs = [x, *(w.requires_grad_() for w in weights)]
            y = vf.functional.se(*inputs, hidden_activation=hidden, gate_activation=gate)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@on_devices
@entries
@formats
def test_nan_stays_in_its_image(entry, layout, device, resident):
    """The gate spreads it over its whole image, and not to the neighbour."""
    x = feature_map((2, 72, 5, 8), layout, torch.float32, device)
    x[1, 70, 4, 7] = torch.nan
    fast, plain = (m.to(device) for m in entry.pair(72))
    with vf.use_backend("triton"):
        found = run(fast, x)
    for name, want in run(plain, x).items():
        assert torch.equal(found[name].isnan(), want.isnan()), name


@pytest.mark.skipif(not INTERPRETED, reason="orders the programs: needs TRITON_INTERPRET=1")
@entries
@formats
def test_any_order_gives_the_same_bits(entry, layout, small_tiles):
    x, fast, results = feature_map((2, 72, 5, 8), layout, torch.float32), entry.pair(72)[0], []
    for seed in range(3):
        with teams.resident("cpu"), teams.together(seed), vf.use_backend("triton"):
            results.append(run(fast, x))
    assert all(torch.equal(again[name], t) for again in results[1:] for name, t in results[0].items())


@pytest.mark.skipif(not INTERPRETED, reason="orders the programs: needs TRITON_INTERPRET=1")
@entries
@pytest.mark.parametrize("late", [False, True], ids=["never waits", "waits for one too many"])
def test_faults_of_waiting_are_found(entry, late, small_tiles, monkeypatch):
    """Without the wait, programs add sums that nobody has stored yet; with a larger team, nobody goes on."""
    meet = kernels.meet
    wrong = (lambda meet_ptr, n, team: meet(meet_ptr, n, team + 1)) if late else lambda *_: None
    for module in (resident_se, resident_eca):
        monkeypatch.setattr(module, "meet", wrong)
    x, fast = feature_map((2, 72, 5, 8), "nchw", torch.float32), entry.pair(72)[0]
    with teams.resident("cpu"), teams.together(), vf.use_backend("triton"):
        if late:
            with pytest.raises(Exception, match="waits for what never comes"):
                run(fast, x)
        else:
            torch.use_deterministic_algorithms(True)  # fills new memory with NaN
            try:
                found = run(fast, x)
            finally:
                torch.use_deterministic_algorithms(False)
            assert not all(t.isfinite().all() for t in found.values())


@not_interpreted
@pytest.mark.parametrize(
    ("target", "shapes"), [("sm_90", (compiled.SHAPES[0], compiled.HUGE[0])), ("gfx942", compiled.SHAPES[:1])]
)
def test_compiled(target, shapes):
    """There are no spills; accesses are wide, addresses 64 bits, also for over 2^31 elements; x is loaded once."""
    found = compiled.compile_all(compiled.variants(compiled.calls(shapes, [torch.bfloat16], resident=True), [target]))
    faults = [fault for kernel in found for fault in kernel.faults]
    assert not faults, "\n".join(faults)
    teams_kernels = [kernel for kernel in found if "resident" in kernel.variant.kernel]
    assert len(teams_kernels) == 16
    for kernel in teams_kernels:
        tile = kernel.variant.uses[0].launch.constants
        threads = kernel.variant.options["num_warps"] * compiled.TARGETS[target].warp_size
        position = next(i for i, name in enumerate(kernel.variant.parameters) if name in ("x_ptr", "upstream.x"))
        loads = [a for a in kernel.accesses if a.kind == "load" and position in a.arguments and a.width == 16]
        assert len(loads) == tile["TILE.BLOCK_C"] * tile["TILE.BLOCK_P"] // 8 // threads, kernel.variant.label


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@entries
@formats
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (32, 2048, 7, 7), (2, 96, 113, 111)], ids=str)
def test_on_cuda_as_streaming(entry, layout, shape):
    """Many teams give the same bits each time, while another stream runs the same kernels, and in a graph."""
    x = feature_map(shape, layout, torch.bfloat16, "cuda").requires_grad_()
    module = entry.pair(shape[1], torch.bfloat16)[0].cuda()
    inputs = [x, *module.parameters()]

    def step():
        y = module(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    with vf.use_backend("triton"):
        streamed = step()
        with teams.resident("cuda"):
            first, other = step(), torch.cuda.Stream()
            for got, want in zip(first, streamed, strict=True):
                torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
            other.wait_stream(torch.cuda.current_stream())
            for _ in range(50):
                with torch.cuda.stream(other):
                    beside = step()
                assert all(torch.equal(a, b) for a, b in zip(step(), first, strict=True))
            torch.cuda.current_stream().wait_stream(other)
            assert all(torch.equal(a, b) for a, b in zip(beside, first, strict=True))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
