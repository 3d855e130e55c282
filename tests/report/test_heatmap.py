"""The heatmap command, on the photograph of the examples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import visattn_fast as vf

pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from visattn_fast import cli  # noqa: E402
from visattn_fast.models import GATES, AttentionResNet  # noqa: E402
from visattn_fast.models.rotation import rotated_crops  # noqa: E402
from visattn_fast.report import heatmap, overlays  # noqa: E402

PHOTOGRAPH = Path(__file__).parents[2] / "examples" / "china.jpg"


@pytest.fixture(autouse=True)
def own_open_of_pillow(monkeypatch):
    """Ultralytics, which other tests import, replaces it: findings/ultralytics_replaces_image_open.sh."""
    patches = sys.modules.get("ultralytics.utils.patches")
    if patches is not None:
        monkeypatch.setattr(image_module, "open", patches._image_open)


def heatmap_of(path: Path, *options: str) -> int:
    return cli.main(["heatmap", str(path), "--size", "80", *options])


def test_command_trains_and_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "out.png"
    assert heatmap_of(PHOTOGRAPH, "--steps", "2", "--out", str(out)) == 0
    assert "trained on this photograph alone (2 steps" in capsys.readouterr().out
    with image_module.open(out) as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 1000


def test_weights_are_read_from_a_file(tmp_path, capsys):
    file, out = tmp_path / "weights.pt", tmp_path / "out.png"
    torch.save(AttentionResNet("cbam", num_classes=4, width=16, fused=False).state_dict(), file)
    assert heatmap_of(PHOTOGRAPH, "--weights", str(file), "--out", str(out)) == 0
    assert "weights from weights.pt" in capsys.readouterr().out
    assert out.exists()


def test_picture_has_a_row_for_each_gate(tmp_path, capsys):
    """More gates make it higher, not wider."""
    every, few = tmp_path / "every.png", tmp_path / "few.png"
    assert heatmap_of(PHOTOGRAPH, "--steps", "0", "--attention", "all", "--out", str(every)) == 0
    out = capsys.readouterr().out
    assert "the attention is noise" in out
    assert [line for line in out.splitlines() if line in GATES] == list(GATES)
    assert heatmap_of(PHOTOGRAPH, "--steps", "0", "--attention", "se,cbam", "--out", str(few)) == 0
    with image_module.open(every) as picture, image_module.open(few) as smaller:
        assert picture.width == smaller.width
        assert picture.height > smaller.height


@pytest.mark.parametrize("attention", GATES)
@pytest.mark.parametrize("fused", [True, False])
def test_views_are_the_gates_and_leave_the_model_alone(attention, fused):
    torch.manual_seed(0)
    model = AttentionResNet(attention, width=8, fused=fused).train()
    model.stages[0][0].bn1.eval()
    x = vf.catalogue.feature_map((2, 3, 12, 9))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    views = heatmap.views(model, x)
    assert [tuple(view.gain.shape) for view in views] == [(12, 9), (6, 5), (3, 3)]
    assert modes == [module.training for module in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    maps = vf.attention_maps(model, x[:1])
    shown = [gate for view in views for gate in view.gates.values()]
    for gate, expected in zip(shown, maps.values(), strict=True):
        torch.testing.assert_close(gate, expected)
    for view in views:
        if view.gates.keys() == {"channel"}:
            assert (view.gates["channel"].min() <= view.gain * 1.0001).all()
            assert (view.gates["channel"].max() >= view.gain * 0.9999).all()
    drawn = overlays.lines(views)
    assert drawn[0].is_map
    assert all(len(line.panels) == 3 for line in drawn)
    for panel, view in zip(drawn[0].panels, views, strict=True):
        assert panel.shape == view.gain.shape


def test_lines_put_maps_first_and_merge_directions():
    """Channels are sorted; branches stay together."""
    gain = torch.rand(4, 5)
    height, width, channel = torch.rand(1, 3, 4, 1), torch.rand(1, 3, 1, 5), torch.rand(1, 3, 1, 1)
    spatial, branch = torch.rand(1, 1, 4, 5), torch.rand(1, 2, 3, 1, 1)

    def drawn(**gates):
        return {
            line.label: torch.from_numpy(line.panels[0].copy()) for line in overlays.lines([overlays.View(gates, gain)])
        }

    found = drawn(channel=channel, spatial=spatial)
    assert list(found) == ["spatial gate", "channel gate, sorted"]
    assert torch.equal(found["spatial gate"], spatial[0, 0])
    assert torch.equal(found["channel gate, sorted"][0], channel.flatten().sort(descending=True).values)
    (product,) = drawn(height=height, width=width).values()
    torch.testing.assert_close(product, (height * width)[0].mean(0))
    over, under = drawn(branch=branch).items()
    assert torch.equal(over[1], gain)
    assert under[0] == "branch gates, sorted by the first"
    assert {tuple(pair) for pair in under[1].T.tolist()} == {tuple(pair) for pair in branch[0, :, :, 0, 0].T.tolist()}


def test_hooks_are_removed_if_the_model_fails():
    model = AttentionResNet("cbam", width=8)
    with pytest.raises(ValueError, match="x must have 3 channels"):
        heatmap.views(model, torch.zeros(1, 1, 8, 8))
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_rotated_crops_turn_back_upright():
    image = torch.arange(3 * 9 * 11).reshape(3, 9, 11)
    x, turns = rotated_crops(image, 2, 5, torch.Generator().manual_seed(0))
    assert x.shape == (8, 3, 5, 5)
    assert turns.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for crop, k in zip(x, turns.tolist(), strict=True):
        upright = crop.rot90(-k, (1, 2))
        assert (upright[:, 1:] - upright[:, :-1] == 11).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("missing.jpg", (), "No such file"),
        ("text.jpg", (), "cannot identify image file"),
        ("cut.jpg", (), "truncated"),
        (".", (), "directory"),
        (str(PHOTOGRAPH), ("--size", "8"), "--size must be at least 64"),
        (str(PHOTOGRAPH), ("--out", "out.nonesuch"), "--out must end in"),
        (str(PHOTOGRAPH), ("--out", "text.jpg/out.png"), "--out: cannot write into text.jpg"),
        (str(PHOTOGRAPH), ("--attention", "nonesuch"), "--attention must be all, or names among se, eca"),
        (str(PHOTOGRAPH), ("--attention", "se,,eca"), "got ''"),
        (str(PHOTOGRAPH), ("--attention", "all", "--weights", "other.pt"), "--weights needs a single gate"),
        (str(PHOTOGRAPH), ("--weights", "missing.pt"), "No such file"),
        (str(PHOTOGRAPH), ("--weights", "text.jpg"), "text.jpg is not a state_dict of this network"),
        (str(PHOTOGRAPH), ("--weights", "other.pt"), "other.pt is not a state_dict of this network"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, name, options, message):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.jpg").write_bytes(PHOTOGRAPH.read_bytes()[:5000])
    torch.save(AttentionResNet("se").state_dict(), tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    assert heatmap_of(Path(name), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("visattn-fast heatmap: ")
    assert message in error
    assert error.count("\n") == 1
