"""`explain` names the backend and the ops that serve, every reason against the others, and runs nothing."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import INTERPRETED, RecordedOps, entries, feature_map
from visattn_fast import catalogue
from visattn_fast.ops.library import OPS

pytestmark = pytest.mark.interpreted
KERNELS = "triton" if INTERPRETED else "cpp"


@entries
@pytest.mark.parametrize("training", [True, False])
def test_named_ops_are_those_that_a_call_dispatches(entry, training):
    module, x = entry.pair(32)[0], feature_map((2, 32, 6, 5), "channels_last", torch.float32)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.set_grad_enabled(training):
        explained = vf.explain(module, x)
        for name, t in module.state_dict().items():
            assert torch.equal(t, before[name]), f"explain changed {name}"
        with RecordedOps() as recorded:
            module(x)
    assert [op for call in explained.calls for op in call.ops] == recorded.names


def test_reasons_against_every_other_backend():
    (call,) = vf.explain(vf.FastECA(16), torch.empty(2, 16, 5, 4)).calls
    assert (call.name, call.decision.backend, call.asked) == ("eca", KERNELS, "auto")
    assert set(call.against) == {"cuda", "triton", "cpp", "reference"} - {KERNELS}
    assert "serves cuda, not cpu" in call.against["cuda"]
    text = str(call)
    assert text.startswith(f"eca on cpu, float32, [2, 16, 5, 4], nchw: {KERNELS}, op eca_fwd")
    assert "export, torch.func: reference: " in text
    assert call.elsewhere["export"].backend == "reference"
    assert not any("opt-in" in reason for reason in call.against.values())  # a missing backend cannot be asked for


def test_ops_made_of_pytorch_are_marked():
    x = torch.empty(2, 16, 5, 4)
    (call,) = vf.explain(vf.FastCrissCross(16), x).calls
    assert call.in_torch == {"criss_cross_fwd"}
    assert "op criss_cross_fwd (PyTorch's operations)" in str(call)
    (call,) = vf.explain(vf.FastSE(16), x).calls
    assert not call.in_torch


def test_tiny_maps_are_plain_when_compiled():
    x = torch.empty(2, 16, 5, 5)
    (call,) = vf.explain(vf.FastSE(16), x).calls
    assert call.elsewhere["torch.compile"].backend == "reference"
    (call,) = vf.explain(vf.FastSE(16), torch.empty(2, 16, 9, 9)).calls
    assert call.elsewhere["torch.compile"].backend == KERNELS


def test_choice_in_force_counts():
    x, gate = torch.empty(2, 16, 5, 4), vf.FastSE(16)
    with vf.use_backend("reference"):
        (call,) = vf.explain(gate, x).calls
        assert (call.decision.backend, call.ops, call.asked) == ("reference", [], "reference")
        assert call.against[KERNELS] == "can serve, but reference is asked for"
    with vf.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot serve"):
        vf.explain(gate, x)


def test_functions_models_and_strangers():
    x = torch.empty(1, 16, 5, 4)
    assert [c.name for c in vf.explain(vf.functional.simam, x).calls] == ["simam"]
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 1), vf.FastCBAM(16), vf.FastGAM(16))
    assert [c.name for c in vf.explain(model, x).calls] == ["cbam", "channel_mlp", "norm_gate"]
    assert str(vf.explain(torch.nn.ReLU(), x)) == "no function of visattn_fast is called"


def test_every_named_op_is_registered():
    for entry in catalogue.ENTRIES.values():
        for call in vf.explain(entry.pair(32)[0], torch.empty(2, 32, 6, 5)).calls:
            assert set(call.ops) <= set(OPS)
