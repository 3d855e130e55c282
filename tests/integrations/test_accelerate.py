"""accelerate and restore: what they swap, what they leave alone, and what an example adds."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import visattn_fast as vf
from outside import timm_model
from visattn_fast.catalogue import feature_map
from visattn_fast.integrations import verify
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


def test_copies_stay_accelerated_and_can_be_restored():
    """By deepcopy, pickle and torch.save."""
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


def test_subclass_and_hooked_module_are_left_alone():
    """The reason is given."""
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
