"""accelerate and restore: what they swap, what they leave alone, and what an example adds."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import outside
import visattn_fast as vf
from outside import library, timm_model
from visattn_fast.catalogue import feature_map
from visattn_fast.integrations import verify
from visattn_fast.integrations.recipe import is_swapped
from visattn_fast.models import AttentionResNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
C = 32


def small(fused: bool = False) -> AttentionResNet:
    torch.manual_seed(0)
    return AttentionResNet("se", width=8, depths=(1, 1), fused=fused).eval()


@pytest.fixture
def seconds(monkeypatch):
    """Returns the times that the clock will show, to be changed by a test."""
    found = {"original": 2.0, "fused": 1.0}
    monkeypatch.setattr(verify, "interleaved", lambda runs, *_: {name: [found[name]] * 5 for name in runs})
    return found


@pytest.mark.usefixtures("seconds")
def test_example_checks_blocks_after_their_gates():
    """A block of timm is asked again after its gate was compared with the original."""
    model = timm_model("resnet10t", block_args={"attn_layer": "se"})()
    found = vf.accelerate(model, feature_map((2, 3, 32, 32)))
    assert not found.skipped, str(found)
    assert [s.speedup for s in found.swapped] == [2.0] * 8


@pytest.mark.parametrize("norm", ["GroupNorm1", "LayerNorm2d"])
@pytest.mark.usefixtures("seconds")
def test_blocks_with_any_norm_pass_the_example(norm):
    """In eval mode too, where a batch norm would be folded."""
    layer = getattr(library("timm.layers"), norm)
    model = timm_model("resnet10t", block_args={"attn_layer": "se"}, norm_layer=layer)().eval()
    plain, x = copy.deepcopy(model), feature_map((2, 3, 32, 32))
    found = vf.accelerate(model, x)
    assert len(found.swapped) == 8
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


def test_copies_stay_accelerated_and_can_be_restored():
    model, x = small(), feature_map((2, 3, 8, 8))
    want = small()(x)
    vf.accelerate(model)
    gate = copy.copy(model.stages[0][0].gate)
    assert isinstance(gate, vf.FastSE)
    assert gate.fc is model.stages[0][0].gate.fc
    other = copy.deepcopy(model)
    assert isinstance(other.stages[0][0].gate, vf.FastSE)
    assert other.stages[0][0].gate.fc is not model.stages[0][0].gate.fc
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert vf.restore(other) == 4
    assert torch.equal(other(x), want)
    assert vf.accelerate(model).swapped == []  # once is enough


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickles_are_plain(protocol):
    """A pickle holds the library's own classes, whatever the protocol, and the model stays accelerated."""
    model, x = small(), feature_map((2, 3, 8, 8))
    want, kinds = model(x), [type(m) for m in model.modules()]
    keys = [list(m.__dict__) for m in model.modules()]
    vf.accelerate(model)
    other = pickle.loads(pickle.dumps(model, protocol))
    assert [type(m) for m in other.modules()] == kinds
    assert [list(m.__dict__) for m in other.modules()] == keys
    assert torch.equal(other(x), want)
    assert len(vf.accelerate(other).swapped) == 4
    assert vf.restore(model) == 4


def test_saved_model_loads_without_this_package(tmp_path):
    """torch.load in a process that cannot import it."""
    model, x = timm_model("resnet10t", block_args={"attn_layer": "se"})().eval(), feature_map((2, 3, 32, 32))
    want, file = model(x), tmp_path / "model.pt"
    vf.accelerate(model)
    torch.save({"model": model, "x": x, "want": want.detach()}, file)
    program = f"""
import sys
sys.modules["visattn_fast"] = None
sys.path.insert(0, {str(Path(outside.__file__).parent)!r})
sys.modules["pytest"] = sys  # `outside` imports it and uses nothing of it here
from outside import library
library("timm")
import torch
saved = torch.load({str(file)!r}, weights_only=False)
torch.testing.assert_close(saved["model"](saved["x"]), saved["want"], rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_restore_takes_off_only_its_own_class():
    """A class that another tool put on top of it is not lost: nothing is restored, and the error says why."""
    model = timm_model("resnet10t", block_args={"attn_layer": "se"})()
    swapped = vf.accelerate(model).swapped
    gate = model.layer1[0].se
    gate.scale = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(gate, "scale", nn.Identity())
    with pytest.raises(RuntimeError, match=r"layer1\.0\.se cannot be restored: .* a ParametrizedFastSEModule"):
        vf.restore(model)
    assert all(is_swapped(s.module) for s in swapped)
    parametrize.remove_parametrizations(gate, "scale")
    assert vf.restore(model) == len(swapped)


def test_sharded_gates_and_layers_serve(tmp_path):
    """fully_shard gives the gate a class of its own, which restore would lose. A layer that it shards is called."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    try:
        model = timm_model("resnet10t", block_args={"attn_layer": "se"})()
        x = feature_map((2, 3, 32, 32))
        want = copy.deepcopy(model).eval()(x)
        vf.accelerate(model)
        mesh = dist.init_device_mesh("cpu", (1,))
        for sharded in (model.layer1[0].se, model.layer2[0].se.fc1):
            fully_shard(sharded, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"layer1\.0\.se cannot be restored: .* a FSDPFastSEModule"):
            vf.restore(model)
        torch.testing.assert_close(model.eval()(x), want, rtol=1e-4, atol=1e-4)
    finally:
        dist.destroy_process_group()


def test_accelerated_model_compiles_and_exports():
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


def test_subclass_is_left_alone():
    """The reason is given. A module with hooks inside is swapped, and calls its layers."""
    hooked = vf.reference.SE(C)
    hooked.fc[0].register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"mine": Doubled(C), "hooked": hooked, "known": vf.reference.SE(C), "fast": vf.FastSE(C)})
    kinds = {name: type(module) for name, module in model.items()}
    found = vf.accelerate(model)
    assert {s.name: s.note for s in found.swapped} == {"hooked": "fc.0 has hooks", "known": ""}
    assert str(found).splitlines()[-2:] == ["hooked calls its layers: fc.0 has hooks", "2 swapped, 1 left alone"]
    model["known"].fc[3] = nn.Hardsigmoid()
    assert str(found).splitlines()[-2] == "known calls its layers: fc.3 is Hardsigmoid, not Sigmoid"
    assert {s.name: s.reason for s in found.skipped} == {"mine": "is a subclass, whose forward may be its own"}
    assert {n: type(model[n]) for n in ("mine", "fast")} == {n: kinds[n] for n in ("mine", "fast")}


def test_gate_without_hidden_units_is_left_alone():
    with pytest.warns(UserWarning, match="zero-element"):
        model = library("torchvision.ops").SqueezeExcitation(C, 0)
    found = vf.accelerate(model)
    assert not found.swapped
    assert [s.reason for s in found.skipped] == ["fc1 has no hidden unit"]


def test_only_and_except_choose_by_name():
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


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_names_look_through_wrappers(wrap):
    """Names with and without what wrappers add, around the model and inside it."""
    model = wrap(small())
    assert {s.op for s in vf.accelerate(model, only=["stages.1"]).swapped} == {"se", "epilogue"}
    whole = small()
    whole.stages[0] = wrap(whole.stages[0])
    (inner,) = (name for name, m in whole.named_modules() if type(m) is vf.reference.SE and name.startswith("stages.0"))
    assert inner != "stages.0.0.gate"
    for name in (inner, "stages.0.0.gate"):
        (swapped,) = vf.accelerate(whole, only=[name]).swapped
        assert swapped.name == inner
        vf.restore(whole)
    assert len(vf.accelerate(whole, except_=["stages.0.0"]).swapped) == 2


def test_plain_string_is_one_name():
    model = small()
    assert len(vf.accelerate(model, only="stages.1").swapped) == 2
    vf.restore(model)
    assert len(vf.accelerate(model, except_="stages.1.0.gate").swapped) == 2
    vf.restore(model)
    assert len(vf.accelerate(model, only="").swapped) == 4  # the model itself


@pytest.mark.parametrize("argument", ["only", "except_"])
def test_name_of_no_module_raises(argument):
    """Before anything is swapped."""
    model = small()
    with pytest.raises(ValueError, match=f"{argument} must name modules of the model, got 'stage.1'"):
        vf.accelerate(model, **{argument: ["stages.1", "stage.1"]})
    assert vf.restore(model) == 0


def test_accelerate_imports_no_library():
    program = (
        "import sys, visattn_fast as vf; from visattn_fast.models import AttentionResNet\n"
        "assert len(vf.accelerate(AttentionResNet('se', fused=False)).swapped) == 6\n"
        "assert not {'timm', 'torchvision', 'monai', 'segmentation_models_pytorch'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_parts_of_fused_modules_are_left_alone():
    """They do not run."""
    found = vf.accelerate(AttentionResNet("cbam", width=8, depths=(1, 1), fused=True))
    assert not found.swapped, str(found)


@pytest.mark.parametrize(("attention", "expected"), [("se", "0.0 x"), ("cbam", "1.0 x")])
@pytest.mark.usefixtures("seconds")
def test_expected_saving_is_what_an_example_measures(attention, expected):
    """Without an example the table shows the expected saving of each module."""
    model = AttentionResNet(attention, width=32, depths=(1, 1), fused=False)
    found = vf.accelerate(model, blocks=False)
    assert [s.less for s in found.swapped] == [expected] * 2
    assert str(found).count(expected) == 2
    vf.restore(model)
    found = vf.accelerate(model, feature_map((2, 3, 32, 32)), blocks=False)
    inputs = [2 * width * side**2 * 4 for width, side in ((32, 32), (64, 16))]
    assert [f"{s.saved_bytes / size:.1f} x" for s, size in zip(found.swapped, inputs, strict=True)] == [expected] * 2


def test_expected_saving_runs_no_hooks():
    """Hooks would get tensors without values."""
    model, seen = small().train(), []
    model.stages[0][0].gate.register_forward_hook(lambda *_: seen.append("ran"))
    model.stages[1][0].gate.fc[0].register_forward_hook(lambda *_: seen.append("ran"))
    str(vf.accelerate(model))
    assert seen == []


@pytest.mark.usefixtures("seconds")
def test_example_fills_in_the_figures():
    """It leaves no trace in the model."""
    model, x = small().train(), feature_map((4, 3, 8, 8))
    state = copy.deepcopy(model.state_dict())
    found = vf.accelerate(model, x)
    assert len(found.swapped) == 4
    assert not found.skipped
    assert all(s.speedup == 2.0 for s in found.swapped)
    assert found.backend == "cpp"
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    lines = str(found).splitlines()
    assert lines[0].split() == ["module", "class", "served", "by", "keeps", "less", "faster"]
    assert lines[-1] == "4 swapped, 0 left alone"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 8, 8), "0.gate: x must have 32 channels, as the weights have, got shape (2, 5, 8, 8)"),
        ((C, 8), "0.gate: x must have shape [N, C, H, W], got 2 dimensions: (32, 8)"),
        (
            (C, 8, 8),
            "0.gate: x must have 32 channels, as the weights have, got shape (32, 8, 1, 8), made of (32, 8, 8); x[",
        ),
        (
            (2, 5, 4, 8, 8),
            "x must have 32 channels, as the weights have, got shape (2, 5, 32, 8), made of (2, 5, 4, 8, 8)",
        ),
    ],
)
def test_errors_name_the_module_and_the_way_out(shape, message):
    model = nn.Sequential(nn.Sequential(OrderedDict(gate=vf.reference.SE(C))))
    vf.accelerate(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.zeros(shape))
    plain = nn.Sequential(vf.FastSE(C))
    with pytest.raises(ValueError, match=r"^x must have"):
        plain(torch.zeros(shape))


def test_failing_example_leaves_nothing_swapped():
    model = small()
    with pytest.raises(ValueError, match="x must have 3 channels"):
        vf.accelerate(model, feature_map((2, 5, 8, 8)))
    assert vf.restore(model) == 0


def test_slower_module_is_put_back(seconds):
    """A block without a swapped gate is put back, too."""
    seconds["fused"] = 3.0
    model = small()
    found = vf.accelerate(model, feature_map((4, 3, 8, 8)))
    assert not found.swapped
    assert {s.reason for s in found.skipped if s.kind == "SE"} == {"slower on this device: 0.67 x"}
    assert {s.reason for s in found.skipped if s.kind != "SE"} == {"gate is SE, not a fused gate with an epilogue"}
    assert not any(type(m) is vf.FastSE for m in model.modules())


@pytest.mark.usefixtures("seconds")
def test_wrong_module_is_put_back_with_a_warning(monkeypatch):
    model, x = small(), feature_map((4, 3, 8, 8))
    forward = vf.FastSE.forward
    monkeypatch.setattr(vf.FastSE, "forward", lambda self, x, **epilogue: 1.01 * forward(self, x, **epilogue))
    with pytest.warns(
        UserWarning, match=r"stages.0.0.gate \(SE\) is put back: its fused forward differs in its result"
    ):
        found = vf.accelerate(model, x, only=["stages.0"], blocks=False)
    assert not found.swapped
    assert torch.equal(model(x), small()(x))
