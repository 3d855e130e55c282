"""The heat-map command over the photograph that the examples ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import visattn_fast as vf

pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

from visattn_fast import cli  # noqa: E402
from visattn_fast.models import AttentionResNet  # noqa: E402
from visattn_fast.models.rotation import rotated_crops  # noqa: E402
from visattn_fast.report import heatmap  # noqa: E402

PHOTOGRAPH = Path(__file__).parents[1] / "examples" / "china.jpg"


def heatmap_of(path: Path, *options: str) -> int:
    return cli.main(["heatmap", str(path), "--size", "80", *options])


def test_picture(tmp_path, capsys):
    out = tmp_path / "out.png"
    assert heatmap_of(PHOTOGRAPH, "--steps", "2", "--out", str(out)) == 0
    assert "trained on this photograph alone (2 steps" in capsys.readouterr().out
    with image_module.open(out) as picture:
        assert picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 1000


def test_weights_from_a_file(tmp_path, capsys):
    file, out = tmp_path / "weights.pt", tmp_path / "out.png"
    torch.save(AttentionResNet("cbam", num_classes=4, width=16, fused=False).state_dict(), file)
    assert heatmap_of(PHOTOGRAPH, "--weights", str(file), "--out", str(out)) == 0
    assert "weights from weights.pt" in capsys.readouterr().out
    assert out.exists()


@pytest.mark.parametrize("fused", [True, False])
def test_maps_are_the_gates_and_leave_the_model_alone(fused):
    model = AttentionResNet("cbam", width=8, fused=fused).double()
    gate = model.stages[0][0].gate
    x = vf.catalogue.feature_map((2, 3, 12, 9), dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval()(x)
    seen = []
    handle = gate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    first, *others = heatmap.attention_maps(model.train(), x)
    handle.remove()
    assert [m.spatial.shape for m in (first, *others)] == [(12, 9), (6, 5), (3, 3)]
    assert [len(m.channel) for m in (first, *others)] == [8, 16, 32]
    gated = seen[0][0] * first.channel[:, None, None] * first.spatial
    torch.testing.assert_close(gated, vf.reference.cbam(seen[0], *gate.weights())[0])
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(x), expected)


def test_hooks_go_even_if_the_model_fails():
    model = AttentionResNet("cbam", width=8)
    with pytest.raises(ValueError, match="x must have 3 channels"):
        heatmap.attention_maps(model, torch.zeros(1, 1, 8, 8))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_rotated_crops():
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
        (str(PHOTOGRAPH), ("--weights", "missing.pt"), "No such file"),
        (str(PHOTOGRAPH), ("--weights", "text.jpg"), "text.jpg is no state_dict of this network"),
        (str(PHOTOGRAPH), ("--weights", "other.pt"), "other.pt is no state_dict of this network"),
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
