"""The rows of the report: modes, counts, bytes, and every contender once for real."""

from __future__ import annotations

import sys
import time

import pytest
import torch
import torch.nn.functional as F

from outside import library
from visattn_fast.catalogue import ENTRIES
from visattn_fast.measure.step import MODES, step
from visattn_fast.measure.timing import Effort, Prepared, WallClock
from visattn_fast.report.cases import CONTENDERS, Case, choose, matrix
from visattn_fast.report.contest import Contest
from visattn_fast.report.launch_counts import dispatched, generated_calls
from visattn_fast.report.rows import bytes_moved, measure

CPU = torch.device("cpu")
SHAPE = (2, 16, 6, 5)
ONCE = Effort(seconds=0, fewest=2, most=2)


@pytest.mark.parametrize("op", ["cbam", "coord_att"])
@pytest.mark.parametrize("mode", MODES)
def test_row_of_every_mode(op, mode):
    """Results are right, ops are counted, and memory is kept for a backward pass if there is one."""
    rows = {r.contender: r for r in measure(Case(op, SHAPE, mode=mode), CPU, ONCE, ("eager", "fused")).rows}
    eager, fused = rows["eager"], rows["fused"]
    assert not eager.failure
    assert not fused.failure
    assert fused.error < 1e-5
    assert eager.kernels > 4
    passes = {"cbam": 1, "coord_att": 3}[op]  # means, gates, x times gates; as many for gradients
    statistics = 4 if op == "coord_att" and mode in ("forward", "both") else 0  # running ones, and their count
    assert fused.kernels == passes * (1 + (mode == "both")) + statistics
    assert bool(fused.saved_bytes) == (mode in ("backward", "both"))
    assert fused.gb_per_s == pytest.approx(fused.bytes / fused.p50_ms * 1e-6)
    assert fused.percent_of_copy == pytest.approx(100 * fused.gb_per_s / rows["copy"].gb_per_s)


def test_every_contender_has_figures():
    """Compiled ones too, at a tiny size."""
    rows = {r.contender: r for r in measure(Case("simam", SHAPE), CPU, ONCE, tuple(CONTENDERS)).rows}
    own = {name: contender for name, contender in CONTENDERS.items() if not contender.library}
    assert rows.keys() == {"copy", *own}
    for name, contender in own.items():
        row = rows[name]
        assert not row.failure, row.failure
        assert row.kernels >= 1
        assert row.error < 1e-5
        assert (row.compile_s is not None) == (contender.compiled is not None)
    assert rows["fused"].kernels == rows["fused-compile"].kernels == 1
    assert rows["compile"].kernels < rows["eager"].kernels


@pytest.mark.parametrize("op", ["window_attention", "self_attention"])
def test_timm_modules_give_our_results(op, monkeypatch):
    """With our parameters, gradients included; without timm they take no part."""
    library("timm.models.swin_transformer")
    case = Case(op, (1, 64, 14, 7), mode="both")
    rows = {r.contender: r for r in measure(case, CPU, ONCE, ("timm", "fused")).rows}
    assert not any(r.failure for r in rows.values())
    assert rows["timm"].error < 1e-5
    for name in ("timm.models.swin_transformer", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not Contest(case, CPU).has("timm")


def test_inference_is_in_eval_mode():
    """Batch norms use their running statistics."""
    contest = Contest(Case("coord_att", SHAPE, mode="inference"), CPU)
    (y,) = contest.run("fused")()
    assert y.is_inference()
    assert not contest.fast.training
    torch.testing.assert_close(y.clone(), contest.plain(contest.x).detach())
    assert Contest(Case("coord_att", SHAPE), CPU).fast.training


def test_backward_alone_leaves_the_forward_off_the_clock():
    """Its results are the gradients of mode both."""
    w = torch.ones(3, requires_grad=True)

    def slow(x):
        time.sleep(0.05)
        return x * w

    x, grad = torch.arange(3.0).requires_grad_(), torch.ones(3)
    run = step("backward", slow, (x,), (x, w), grad)
    assert WallClock()(run) < 0.04
    assert WallClock()(step("both", slow, (x,), (x, w), grad)) >= 0.05
    for got, want in zip(run(), step("both", slow, (x,), (x, w), grad)()[1:], strict=True):
        assert torch.equal(got, want)


def test_bytes_moved_are_the_catalogues_passes():
    """None if PyTorch alone serves the module."""
    entry, evaluated = ENTRIES["nam"], ENTRIES["nam_eval"]
    passes = {mode: bytes_moved(Case("nam", SHAPE, mode=mode), "fused", 100) for mode in MODES}
    assert passes == {
        "forward": 100 * entry.forward_passes,
        "backward": 100 * entry.backward_passes,
        "both": 100 * (entry.forward_passes + entry.backward_passes),
        "inference": 100 * evaluated.forward_passes,
    }
    assert bytes_moved(Case("nam", SHAPE), "copy", 100) == 200
    assert bytes_moved(Case("criss_cross", SHAPE), "fused", 100) is None


def test_dispatched_counts_launches():
    """Views and empty tensors count nothing, a composite op counts its parts, a backward run only its timed half."""
    x = torch.ones(4, 4)
    assert dispatched(lambda: torch.empty_like(x.view(16).relu()).add_(1)) == 2
    with torch.inference_mode():
        assert dispatched(lambda: F.linear(x, x).sigmoid()) == 2
    leaf = x.clone().requires_grad_()
    run = Prepared(lambda: (lambda y: lambda: torch.autograd.grad(y, leaf, x))(leaf.sigmoid()))
    assert dispatched(run) == 1


def test_generated_calls_counts_kernels_and_ops():
    source = """
def call(self, args):
    buf0 = empty_strided_cpu((2, 16), (16, 1), torch.float32)
    cpp_fused_mean_0(arg0, buf0)
    extern_kernels.mm(buf0, reinterpret_tensor(arg1, (16, 2), (1, 16), 0), out=buf1)
    triton_poi_fused_0.run(buf1, 64, stream=stream0)
    buf2 = torch.ops.visattn_fast.se_fwd.default(arg0)
    buf3 = buf2[0]
    return (buf3,)

def benchmark_compiled_module():
    cpp_fused_mean_0()
"""
    assert generated_calls(source) == 4


def test_matrix_goes_shape_by_shape():
    """It has every combination once."""
    cases = matrix(("se", "eca"), (SHAPE, (1, 8, 4, 4)), modes=MODES, dtypes=("float32", "bfloat16"))
    assert len(cases) == len(set(cases)) == 2 * 2 * 2 * 4 * 2
    assert {c.shape for c in cases[: len(cases) // 2]} == {SHAPE}


def test_choose_refuses_unknown_names():
    assert choose("all", ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="unknown 'c'; known are a, b"):
        choose("a,c", ("a", "b"))
