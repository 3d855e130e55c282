"""Other libraries' modules with our weights: the same output and gradients, from our reference and fused modules."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import TARGETS, feature_map, needs_dtype, run
from outside import library
from visattn_fast import catalogue

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
C = 32


class Case(NamedTuple):
    """Another library's module, ours, and the names of its parameters by the names of ours."""

    other: nn.Module
    name: str
    arguments: dict
    names: dict[str, str]


def se(other, first, second, reduction, bias=True):
    kinds = ("weight", "bias") if bias else ("weight",)
    names = {f"fc.{i}.{kind}": f"{layer}.{kind}" for i, layer in ((0, first), (2, second)) for kind in kinds}
    return Case(other, "SE", {"channels": C, "reduction": reduction, "bias": bias}, names)


def timm_se(**options):
    return se(library("timm.layers").SEModule(C, **options), "fc1", "fc2", 4, options.get("bias", True))


def timm_eca(channels, kernel_size):
    other = library("timm.layers").EcaModule(channels, **({} if channels else {"kernel_size": kernel_size}))
    return Case(other, "ECA", {"channels": C, "kernel_size": kernel_size}, {"conv.weight": "conv.weight"})


class Gate(nn.Module):
    """Scales x by a gate of ours, as timm's module does; our module returns the gate alone."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return x * self.gate(x)


def timm_channel_attention():
    other = library("timm.layers.cbam").ChannelAttn(C, rd_channels=4)
    return Case(other, "ChannelAttention", {"channels": C}, {f"fc{i}.weight": f"fc{i}.weight" for i in (1, 2)})


def same_names(other, name, arguments):
    """Makes a case of a module whose parameters have the names of ours."""
    return Case(other, name, arguments, {key: key for key, _ in other.named_parameters()})


def timm_coord_attn():
    return same_names(
        library("timm.layers.coord_attn").CoordAttn(C, rd_channels=8, bias=True), "CoordAtt", {"in_channels": C}
    )


def smp_scse():
    return same_names(library("segmentation_models_pytorch.base.modules").SCSEModule(C), "scSE", {"channels": C})


CASES = {
    "timm SEModule": lambda: timm_se(rd_channels=8),
    "timm SEModule, rd_divisor": lambda: timm_se(rd_ratio=1 / 16, rd_divisor=8),
    "timm SEModule, no bias": lambda: timm_se(rd_ratio=1 / 4, bias=False),
    "timm EcaModule": lambda: timm_eca(None, 5),
    "timm EcaModule, by channels": lambda: timm_eca(C, 3),
    "timm ChannelAttn": timm_channel_attention,
    "timm CoordAttn": timm_coord_attn,
    "segmentation-models-pytorch SCSEModule": smp_scse,
    "torchvision SqueezeExcitation": lambda: se(
        library("torchvision.ops").SqueezeExcitation(C, C // 4), "fc1", "fc2", 4
    ),
    "monai ChannelSELayer": lambda: se(library("monai.networks.blocks").ChannelSELayer(2, C), "fc.0", "fc.2", 2),
}
MODULES = [("reference", "cpu", "reference"), *(("fast", *target) for target in TARGETS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("which", "device", "backend"), MODULES)
def test_module_gives_the_same_numbers(which, device, backend, case, layout, dtype):
    other, name, arguments, names = CASES[case]()
    needs_dtype(backend, device, dtype)
    ours = (getattr(vf, f"Fast{name}") if which == "fast" else getattr(vf.reference, name))(**arguments)
    theirs = dict(other.named_parameters())
    assert set(names.values()) == theirs.keys()
    with torch.no_grad():
        for i, (ours_name, p) in enumerate(ours.named_parameters()):
            p.copy_(catalogue.feature_map((1, 1, 1, p.numel()), seed=i).view_as(p) / 2)
            theirs[names[ours_name]].copy_(p.view_as(theirs[names[ours_name]]))
    ours, other = ours.to(device, dtype), other.to(device, dtype)
    x = feature_map((2, C, 7, 6), layout, dtype, device)
    with vf.use_backend(backend):
        got = run(Gate(ours) if name == "ChannelAttention" else ours, x)
    want = run(other, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.pop("y"), want.pop("y"), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.pop("x"), want.pop("x"), rtol=tolerance, atol=tolerance)
    for key, found in got.items():  # gradients, and running statistics
        key = key.removeprefix("gate.")
        expected = want[names.get(key, key)].view_as(found)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
@pytest.mark.parametrize(("hidden", "gate"), [("relu", "sigmoid"), ("relu", "hard_sigmoid"), ("silu", "sigmoid")])
@pytest.mark.parametrize(("which", "device", "backend"), MODULES)
def test_function_takes_torchvisions_parameters(which, device, backend, hidden, gate, layout, dtype):
    """Activations are those of MobileNetV3 and EfficientNet."""
    kinds = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid}
    other = library("torchvision.ops").SqueezeExcitation(C, 8, kinds[hidden], kinds[gate]).to(device, dtype)
    needs_dtype(backend, device, dtype)
    function = vf.functional.se if which == "fast" else vf.reference.se
    parameters = (other.fc1.weight, other.fc1.bias, other.fc2.weight, other.fc2.bias)
    x = feature_map((2, C, 7, 6), layout, dtype, device).requires_grad_()
    grad = feature_map((2, C, 7, 6), layout, dtype, device, seed=1)
    with vf.use_backend(backend):
        y = function(x, *parameters, hidden_activation=hidden, gate_activation=gate)
        got = [y, *torch.autograd.grad(y, (x, *parameters), grad)]
    expected = other(x)
    want = [expected, *torch.autograd.grad(expected, (x, *parameters), grad)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.pop(0), want.pop(0), rtol=tolerance, atol=tolerance)
    if gate == "hard_sigmoid":  # PyTorch's gradient of it takes 1/6 in float32, even in float64
        tolerance = max(tolerance, 1e-8)
    torch.testing.assert_close(got, want, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
@pytest.mark.parametrize(("which", "device", "backend"), MODULES)
def test_sk_equals_timms_selective_kernel(which, device, backend, layout, training):
    """Both paths on all of x; timm's selection is one convolution without bias. Running statistics move alike."""
    other = library("timm.layers").SelectiveKernel(C, C, rd_channels=32, split_input=False)
    ours = (vf.FastSK if which == "fast" else vf.reference.SK)(C)
    pairs = {f"convs.{i}.0": f"paths.{i}.conv" for i in (0, 1)} | {f"convs.{i}.1": f"paths.{i}.bn" for i in (0, 1)}
    pairs |= {"fc.0": "attn.fc_reduce", "fc.1": "attn.bn"}
    for mine, theirs in pairs.items():
        ours.get_submodule(mine).load_state_dict(other.get_submodule(theirs).state_dict())
    with torch.no_grad():
        for branch, weight in zip(ours.fcs, other.attn.fc_select.weight.chunk(2), strict=True):
            branch.weight.copy_(weight)
            branch.bias.zero_()
    ours, other = (m.to(device, torch.float64).train(training) for m in (ours, other))
    x = feature_map((3, C, 7, 6), layout, torch.float64, device)
    with vf.use_backend(backend):
        got = run(ours, x)
    want = run(other, x)
    expected = {name: want[name] for name in ("y", "x")}
    for mine, theirs in pairs.items():
        expected |= {n.replace(theirs, mine, 1): t for n, t in want.items() if n.startswith(f"{theirs}.")}
    chunks = want["attn.fc_select.weight"].chunk(2)
    expected |= {f"fcs.{i}.weight": chunk for i, chunk in enumerate(chunks)}
    assert got.keys() - expected.keys() == {"fcs.0.bias", "fcs.1.bias"}
    for name, t in expected.items():
        torch.testing.assert_close(got[name], t, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
