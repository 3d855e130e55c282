"""Triplet attention: the authors' composition of layers, two gates and three, maxima with equals, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import INTERPRETED, RecordedOps, check, feature_map, layouts, run, targets
from visattn_fast import catalogue, reference

spatials = pytest.mark.parametrize("spatial", [True, False], ids=["three gates", "two gates"])
KERNELS = "triton" if INTERPRETED else "cpp"


class Gate(nn.Module):
    """A gate as the paper has it: the second axis is pooled, and the gate multiplies the same tensor."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv = nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(1, eps=1e-5, momentum=0.01)})

    def forward(self, x):
        pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv["bn"](self.conv["conv"](pooled)))


class Rotated(nn.Module):
    """The published module: x is rotated so that the axis to pool is the second one, gated, and rotated back."""

    def __init__(self, kernel_size: int = 7, spatial: bool = True) -> None:
        super().__init__()
        self.cw, self.hc = Gate(kernel_size), Gate(kernel_size)
        if spatial:
            self.hw = Gate(kernel_size)

    def forward(self, x):
        orders = {"cw": (0, 2, 1, 3), "hc": (0, 3, 2, 1), "hw": (0, 1, 2, 3)}
        gated = [gate(x.permute(orders[name])).permute(orders[name]) for name, gate in self.named_children()]
        return sum(gated) / len(gated)


@targets
@layouts
@spatials
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [3, 7])
def test_modules_match_the_published_composition(size, training, spatial, layout, device, backend):
    """Values, gradients and running statistics; C, H and W differ, so no two axes can be confused."""
    published = Rotated(size, spatial).double().to(device).train(training)
    x = feature_map((3, 6, 9, 5), layout, torch.float64, device)
    published(x)  # statistics other than zeros and ones
    expected = run(published, x)
    for module in (reference.TripletAttention(size, spatial), vf.FastTripletAttention(size, spatial)):
        module.load_state_dict(published.state_dict())
        module = module.double().to(device).train(training)
        with vf.use_backend(backend):
            torch.testing.assert_close(run(module, x), expected)


@targets
@layouts
@pytest.mark.parametrize("training", [True, False])
def test_two_gates_match_reference(training, layout, device, backend):
    name = "triplet_attention" if training else "triplet_attention_eval"
    entry = dataclasses.replace(catalogue.ENTRIES[name], arguments=lambda c: {"kernel_size": 3, "spatial": False})
    for shape in ((2, 16, 8, 8), (3, 5, 7, 6), (1, 70, 3, 9), (1, 3, 9, 70)):
        for dtype in (torch.float32, torch.bfloat16):
            x = feature_map(shape, layout, dtype, device)
            check(entry, x, backend)
            check(entry, x, backend, feature_map(shape, layout, dtype, device, seed=2), "silu")


@targets
@layouts
@spatials
def test_first_of_equal_maxima_gets_the_gradient(spatial, layout, device, backend):
    """Zeros after a ReLU are equal along every axis, in all blocks and splits of the kernels."""
    x = feature_map((1, 40, 18, 70), layout, torch.float64, device).relu()
    x[:, :, 2:9] = 0
    x[:, 3:30] = 0
    x[..., 1:66] = 0
    runs = []
    for cls in (reference.TripletAttention, vf.FastTripletAttention):
        torch.manual_seed(0)
        module = cls(3, spatial).double().to(device)
        with vf.use_backend(backend):
            runs.append(run(module, x))
    torch.testing.assert_close(*runs)


@pytest.mark.interpreted
def test_gates_have_modes_and_statistics_of_their_own():
    """One gate in eval mode, one without running statistics, one with a cumulative average."""
    modules = [cls(3).double() for cls in (reference.TripletAttention, vf.FastTripletAttention)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = feature_map((2, 6, 5, 4), "nchw", torch.float64)
    for module in modules:
        module.cw.conv.bn.eval()
        module.cw.conv.bn.eps = 0.1
        module.hc.conv.bn.running_mean = module.hc.conv.bn.running_var = None
        module.hc.conv.bn.track_running_stats = False
        module.hw.conv.bn.momentum = None
        module(x)
    torch.testing.assert_close(*(run(module, x) for module in modules))
    assert [int(gate.conv.bn.num_batches_tracked) for gate in modules[1].layers()] == [0, 0, 1]


@pytest.mark.interpreted
@layouts
def test_one_read_of_x_pools_all_axes(layout):
    module = vf.FastTripletAttention()
    x = feature_map((2, 8, 6, 5), layout, torch.float32).requires_grad_()
    with vf.use_backend(KERNELS), RecordedOps() as recorded:
        module(x).sum().backward()
    passes = [name for name in recorded.names if name.startswith("triplet")]
    assert passes == ["triplet_pool", "triplet_scale", "triplet_scale_bwd", "triplet_input_grad"]


def gates(**changes):
    """Three gates for `functional.triplet_attention`; ``changes`` are made to hc."""
    gate = vf.functional.PlaneGate(torch.ones(1, 2, 3, 3), *torch.ones(4, 1))
    return gate, gate._replace(**changes), gate


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"conv": torch.ones(1, 2, 4, 4)}, ValueError, r"the kernel size of hc\.conv must be odd"),
        ({"conv": torch.ones(2, 3, 3)}, ValueError, r"hc\.conv must have shape \[1, 2, k, k\], got \[2, 3, 3\]"),
        ({"conv": torch.ones(1, 3, 3, 3)}, ValueError, r"hc\.conv must have shape \[1, 2, 3, 3\]"),
        ({"conv": torch.ones(1, 2, 3, 3).int()}, TypeError, r"hc\.conv must have a floating-point dtype"),
        ({"norm_weight": torch.ones(2)}, ValueError, r"hc\.norm_weight must have shape \[1\], got \[2\]"),
        ({"running_var": None}, ValueError, "hc: running_mean and running_var must be given unless training"),
    ],
)
def test_bad_gates_are_refused(changes, error, message):
    x = torch.ones(2, 4, 3, 3)
    for function in (vf.functional.triplet_attention, reference.triplet_attention):
        with pytest.raises(error, match=message):
            function(x, *gates(**changes))


@pytest.mark.interpreted
def test_a_single_value_is_refused_before_it_is_counted():
    for module in (reference.TripletAttention(3), vf.FastTripletAttention(3)):
        with pytest.raises(ValueError, match=r"hw: its batch norm needs more than 1 value in training"):
            module(torch.ones(1, 4, 1, 1))
        assert int(module.cw.conv.bn.num_batches_tracked) == 0


@pytest.mark.interpreted
def test_bad_arguments_are_refused():
    for cls in (reference.TripletAttention, vf.FastTripletAttention):
        for size in (0, 4, 2.0):
            with pytest.raises(ValueError, match="kernel_size must be"):
                cls(size)
