"""accelerate and restore, on modules of other libraries: the same numbers, and nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import INTERPRETED, run
from outside import library, timm_model, ultralytics_modules
from visattn_fast import catalogue
from visattn_fast.catalogue import ENTRIES, feature_map
from visattn_fast.models import AttentionResNet

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="swaps classes; what the kernels compute is held elsewhere"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
C = 32


def timm(name: str, *arguments: Any, module: str = "timm.layers", **options: Any) -> nn.Module:
    return getattr(library(module), name)(*arguments, **options)


def squeeze_excitation(*activations: type[nn.Module]) -> nn.Module:
    return library("torchvision.ops").SqueezeExcitation(C, 8, *activations)


def monai(name: str, *arguments: Any, dimensions: int = 2) -> nn.Module:
    return getattr(library("monai.networks.blocks"), name)(dimensions, C, *arguments)


def ultralytics(name: str, *arguments: Any) -> nn.Module:
    return getattr(ultralytics_modules(), name)(*arguments)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "timm SEModule": lambda: timm("SEModule", C),
    "timm SEModule, no bias": lambda: timm("SEModule", C, bias=False),
    "timm SEModule, SiLU": lambda: timm("SEModule", C, act_layer=nn.SiLU),
    "timm SEModule, hard sigmoid": lambda: timm("SEModule", C, gate_layer=nn.Hardsigmoid),
    "timm SqueezeExcite": lambda: timm("SqueezeExcite", C, module="timm.models._efficientnet_blocks"),
    "timm EcaModule": lambda: timm("EcaModule", C),
    "timm SEModule, GELU and batch norm": lambda: timm("SEModule", C, act_layer=nn.GELU, norm_layer=nn.BatchNorm2d),
    "timm SqueezeExcite, tanh": lambda: timm(
        "SqueezeExcite", C, gate_layer=nn.Tanh, module="timm.models._efficientnet_blocks"
    ),
    "timm EcaModule, MLP": lambda: timm("EcaModule", C, use_mlp=True),
    "timm EcaModule, hard sigmoid": lambda: timm("EcaModule", C, gate_layer="hard_sigmoid"),
    "timm CecaModule": lambda: timm("CecaModule", C),
    "timm EffectiveSEModule": lambda: timm("EffectiveSEModule", C),
    "timm GatherExcite": lambda: timm("GatherExcite", C, use_mlp=False),
    "timm GlobalContext": lambda: timm("GlobalContext", C, use_attn=False),
    "timm CbamModule": lambda: timm("CbamModule", C, module="timm.layers.cbam"),
    "timm CbamModule, SiLU, bias, hard sigmoid, 3 x 3": lambda: timm(
        "CbamModule",
        C,
        1 / 4,
        spatial_kernel_size=3,
        act_layer=nn.SiLU,
        gate_layer="hard_sigmoid",
        mlp_bias=True,
        module="timm.layers.cbam",
    ),
    "timm LightCbamModule": lambda: timm("LightCbamModule", C, module="timm.layers.cbam"),
    "timm CoordAttn": lambda: timm("CoordAttn", C, module="timm.layers.coord_attn"),
    "timm CoordAttn, skip": lambda: timm("CoordAttn", C, has_skip=True, bias=True, module="timm.layers.coord_attn"),
    "torchvision SqueezeExcitation": squeeze_excitation,
    "torchvision SqueezeExcitation of MobileNetV3": lambda: squeeze_excitation(nn.ReLU, nn.Hardsigmoid),
    "torchvision SqueezeExcitation of EfficientNet": lambda: squeeze_excitation(nn.SiLU, nn.Sigmoid),
    "torchvision SqueezeExcitation, GELU": lambda: squeeze_excitation(nn.GELU),
    "monai ChannelSELayer": lambda: monai("ChannelSELayer"),
    "monai ResidualSELayer": lambda: monai("ResidualSELayer", 4, "relu", "sigmoid"),
    "monai ResidualSELayer as it comes": lambda: monai("ResidualSELayer"),
    "ultralytics CBAM": lambda: ultralytics("CBAM", C),
    "ultralytics ChannelAttention": lambda: ultralytics("ChannelAttention", C),
    "ultralytics SpatialAttention": lambda: ultralytics("SpatialAttention", 3),
    "smp SCSEModule": lambda: library("segmentation_models_pytorch.base.modules").SCSEModule(C),
    **{name: lambda e=e: e.reference(**e.arguments(C)) for name, e in ENTRIES.items() if e.training},
}


@pytest.mark.parametrize("layout", catalogue.LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name, training, layout):
    """Result, gradients and running statistics are those of the original; restored, it is the original."""
    module = MODULES[name]().double().train(training)
    kind, x = type(module), feature_map((2, C, 7, 6), layout, dtype=torch.float64)
    if not training:
        spread_statistics(module)
    want = run(copy.deepcopy(module), x)
    found = vf.accelerate(module)
    assert [(s.name, s.kind) for s in found.swapped] == [("", kind.__name__)]
    assert isinstance(module, kind)
    assert type(module) is not kind
    got = run(copy.deepcopy(module), x)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
    assert vf.restore(module) == 1
    assert type(module) is kind
    assert all(torch.equal(run(module, x)[key], tensor) for key, tensor in want.items() if key in ("y", "x"))


def spread_statistics(module: nn.Module) -> None:
    """Running statistics that are none of zero and one."""
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer += 0.5 * torch.rand_like(buffer)


def small(fused: bool = False) -> AttentionResNet:
    torch.manual_seed(0)
    return AttentionResNet("se", width=8, depths=(1, 1), fused=fused).eval()


def test_blocks_with_an_example(monkeypatch):
    """A block of timm is asked again once its gate has stood beside its original."""
    verify = __import__("visattn_fast.integrations.verify", fromlist=["verify"])
    monkeypatch.setattr(verify, "interleaved", lambda runs, *_: {name: [2.0 - int(name)] * 5 for name in runs})
    model = timm_model("resnet10t", block_args={"attn_layer": "se"})()
    found = vf.accelerate(model, feature_map((2, 3, 32, 32)))
    assert not found.skipped, str(found)
    assert [s.speedup for s in found.swapped] == [2.0] * 8


def test_copies():
    """deepcopy, pickle and torch.save keep what accelerate did, and can be restored on their own."""
    model, x = small(), feature_map((2, 3, 8, 8))
    want = small()(x)
    vf.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(other.stages[0][0].gate) is vf.FastSE
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        assert vf.restore(other) == 4
        assert torch.equal(other(x), want)
    assert vf.accelerate(model).swapped == []  # once is enough


def test_compile_and_export():
    model, x = small(), feature_map((2, 3, 8, 8))
    want = model(x)
    vf.accelerate(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), want, rtol=1e-5, atol=1e-5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), want, rtol=1e-5, atol=1e-5)


class Doubled(vf.reference.SE):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_left_alone():
    """What cannot be served exactly is left as it is, with the reason."""
    hooked = vf.reference.SE(C)
    hooked.fc[0].register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"mine": Doubled(C), "hooked": hooked, "known": vf.reference.SE(C), "fast": vf.FastSE(C)})
    kinds = {name: type(module) for name, module in model.items()}
    found = vf.accelerate(model)
    assert [s.name for s in found.swapped] == ["known"]
    assert {s.name: s.reason for s in found.skipped} == {
        "mine": "is a subclass, whose forward may be its own",
        "hooked": "fc.0 has hooks, which the fused forward would not run",
    }
    assert {n: type(m) for n, m in model.items() if n != "known"} == {n: k for n, k in kinds.items() if n != "known"}


OUTSIDE = {
    "timm max pooling": (lambda: timm("SEModule", C, add_maxpool=True), "add_maxpool"),
    "timm GatherExcite, windows": (
        lambda: timm("GatherExcite", C, extent=2, use_mlp=False),
        "it gathers by windows or convolutions",
    ),
    "timm Swin, dropout": (
        lambda: timm("SwinTransformerBlock", C, (7, 7), 2, attn_drop=0.1, module="timm.models.swin_transformer"),
        "attn_drop or proj_drop",
    ),
    "torchvision Swin, dropout": (
        lambda: library("torchvision.models.swin_transformer").ShiftedWindowAttention(
            C, [7, 7], [3, 3], 2, dropout=0.1
        ),
        "attention_dropout or dropout",
    ),
    "timm GlobalContext as it comes": (lambda: timm("GlobalContext", C), "use_attn: it pools by attention"),
    "timm GlobalContext, added": (lambda: timm("GlobalContext", C, use_attn=False, fuse_add=True), "fuse_add"),
    "timm CoordAttn, ReLU": (
        lambda: timm("CoordAttn", C, act_layer=nn.ReLU, module="timm.layers.coord_attn"),
        "act is ReLU",
    ),
    "monai in three dimensions": (lambda: monai("ChannelSELayer", dimensions=3), "avg_pool is AdaptiveAvgPool3d"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_flavours_left_alone(name):
    build, reason = OUTSIDE[name]
    module = build()
    kind = type(module)
    found = vf.accelerate(module)
    assert type(module) is kind
    assert not found.swapped
    assert found.skipped[0].reason.startswith(reason), found.skipped[0].reason


def test_swin_of_another_size():
    """A block's mask is of one map; where another comes, timm's own code serves, and complains."""
    swin = library("timm.models.swin_transformer")
    x = feature_map((1, 10, 12, C))
    for dynamic, size in ((True, (7, 20)), (False, (12, 13))):
        block = swin.SwinTransformerBlock(C, size, 2, window_size=7, shift_size=3, dynamic_mask=dynamic)
        want = block(x)
        assert vf.accelerate(block).swapped
        torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)
    block = swin.SwinTransformerBlock(C, (7, 20), 2, window_size=7, shift_size=3)
    vf.accelerate(block)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        block(x)


def test_only_and_except():
    model = small()
    found = vf.accelerate(model, only=["stages.1"])
    assert {s.name: s.op for s in found.swapped} == {"stages.1.0.gate": "se", "stages.1.0": "epilogue"}
    assert found.backend == "cpp"
    assert "se in cpp" in str(found)
    vf.restore(model)
    assert {s.name for s in vf.accelerate(model, only=["stages.1"]).swapped} == {"stages.1.0", "stages.1.0.gate"}
    vf.restore(model)
    assert {s.name for s in vf.accelerate(model, except_=["stages.1"]).swapped} == {"stages.0.0", "stages.0.0.gate"}
    vf.restore(model)
    assert {s.name for s in vf.accelerate(model, blocks=False).swapped} == {"stages.0.0.gate", "stages.1.0.gate"}
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        vf.accelerate(3)


def test_libraries_not_imported_are_not_imported():
    program = (
        "import sys, visattn_fast as vf; from visattn_fast.models import AttentionResNet\n"
        "assert len(vf.accelerate(AttentionResNet('se', fused=False)).swapped) == 6\n"
        "assert not {'timm', 'torchvision', 'monai', 'segmentation_models_pytorch'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_parts_of_fused_modules():
    """They do not run, and are left as they are."""
    found = vf.accelerate(AttentionResNet("cbam", width=8, depths=(1, 1), fused=True))
    assert not found.swapped, str(found)


@pytest.mark.parametrize(("attention", "expected"), [("se", "0.0 x"), ("cbam", "1.0 x")])
def test_expected_saving(attention, expected, monkeypatch):
    """Without an example the table says what each module will keep less: what an example then measures."""
    verify = __import__("visattn_fast.integrations.verify", fromlist=["verify"])
    monkeypatch.setattr(verify, "interleaved", lambda runs, *_: {name: [2.0 - int(name)] * 5 for name in runs})
    model = AttentionResNet(attention, width=32, depths=(1, 1), fused=False)
    found = vf.accelerate(model, blocks=False)
    assert [s.less for s in found.swapped] == [expected] * 2
    assert str(found).count(expected) == 2
    vf.restore(model)
    found = vf.accelerate(model, feature_map((2, 3, 32, 32)), blocks=False)
    inputs = [2 * width * side**2 * 4 for width, side in ((32, 32), (64, 16))]
    assert [f"{s.saved_bytes / size:.1f} x" for s, size in zip(found.swapped, inputs, strict=True)] == [expected] * 2


def test_example(monkeypatch):
    """With an example each module is held against its original; a wrong or slow one is put back and named."""
    verify = __import__("visattn_fast.integrations.verify", fromlist=["verify"])
    speed = {"0": 2.0, "1": 1.0}
    monkeypatch.setattr(verify, "interleaved", lambda runs, *_: {name: [speed[name]] * 5 for name in runs})
    model, x = small().train(), feature_map((4, 3, 8, 8))
    state = copy.deepcopy(model.state_dict())
    found = vf.accelerate(model, x)
    assert len(found.swapped) == 4
    assert not found.skipped
    assert all(s.speedup == 2.0 for s in found.swapped)
    assert found.backend == "cpp"
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items()), "the example left traces"
    lines = str(found).splitlines()
    assert lines[0].split() == ["module", "class", "served", "by", "keeps", "less", "faster"]
    assert lines[-1] == "4 swapped, 0 left alone"

    vf.restore(model)
    speed["1"] = 3.0
    found = vf.accelerate(model, x)
    assert not found.swapped
    assert {s.reason for s in found.skipped if s.kind == "SE"} == {"slower on this device: 0.67 x"}
    assert {s.reason for s in found.skipped if s.kind != "SE"} == {"its gate was not swapped, or has no epilogue"}
    assert not any(type(m) is vf.FastSE for m in model.modules())

    speed["1"] = 1.0
    forward = vf.FastSE.forward
    monkeypatch.setattr(vf.FastSE, "forward", lambda self, x, **epilogue: 1.01 * forward(self, x, **epilogue))
    with pytest.warns(
        UserWarning, match=r"stages.0.0.gate \(SE\) is put back: its fused forward differs in its result"
    ):
        found = vf.accelerate(model, x, only=["stages.0"], blocks=False)
    assert not found.swapped
    assert torch.equal(model.eval()(x), small()(x))
