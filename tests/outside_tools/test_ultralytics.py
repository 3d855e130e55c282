"""Ultralytics trains an accelerated YOLO: model, average and checkpoints are those of docs/guide/tools.md."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "ultralytics_training.py"
LOAD = """
import sys
sys.modules["visattn_fast"] = None  # as if not installed
from ultralytics import YOLO
from ultralytics.nn.modules.conv import CBAM
model = YOLO(sys.argv[1]).model
assert [type(model.model[i]) for i in (2, 4)] == [CBAM, CBAM]
assert "visattn_fast" not in open(sys.argv[1], "rb").read().decode("latin-1")
"""


def run(folder, *arguments, **environment):
    """Runs Python offline, with settings in the folder, and without a font to download."""
    settings = folder / "settings"
    (settings / "Ultralytics").mkdir(parents=True, exist_ok=True)
    (settings / "Ultralytics" / "Arial.ttf").touch()
    known = {"YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(settings), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | known | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of four trainings of two epochs: plain, and accelerated in three ways."""
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("ultralytics is not installed")
    folder = tmp_path_factory.mktemp("ultralytics")
    run(folder, SCRIPT, folder)
    return folder


def kinds(trained, way):
    return json.loads((trained / "found.json").read_text())[way]["kinds"]


def test_model_accelerated_before_training_is_not_the_one_that_trains(trained):
    assert kinds(trained, "before") == {"model": "CBAM", "average": "CBAM"}


@pytest.mark.parametrize("way", ["callback", "trainer"])
def test_accelerated_model_trains_alike(trained, way):
    """Both ways, the model and its average stay accelerated; the checkpoint holds the weights of plain training."""
    assert kinds(trained, way) == {"model": "FastCBAM", "average": "FastCBAM"}
    got, want = (torch.load(trained / f"{name}.pt") for name in (way, "plain"))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)  # in float16


@pytest.mark.parametrize("safe", ["", "1"], ids=["default", "restricted"])
@pytest.mark.parametrize("way", ["plain", "callback"])
def test_checkpoint_loads_without_this_package(trained, way, safe):
    """Also if Ultralytics loads its own classes alone."""
    run(trained, "-c", LOAD, trained / way / "weights" / "best.pt", ULTRALYTICS_SAFE_LOAD=safe)
