"""Trains a tiny YOLO with CBAM by Ultralytics in three ways, and writes what happened to a JSON file.

test_ultralytics.py runs this file with a folder, in a process of its own: Ultralytics reads its settings at import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import visattn_fast as vf
from outside import library

CONFIGURATION = """
nc: 2
end2end: True
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, CBAM, [32]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, CBAM, [32]]
  - [[4], 1, Detect, [nc]]
"""
OPTIONS = {"epochs": 2, "batch": 4, "imgsz": 64, "device": "cpu", "optimizer": "SGD", "lr0": 0.01, "amp": False}
OPTIONS |= {"plots": False, "pretrained": False, "verbose": False, "workers": 0}


def write_data(folder: Path) -> Path:
    """Draws eight images with one rectangle each, and writes their labels."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(8):
        image = Image.new("RGB", (64, 64), (10 * i, 60, 90))
        ImageDraw.Draw(image).rectangle((8 + i, 12, 40 + i, 50), fill=(200, 40 * (i % 2), 30))
        image.save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"{i % 2} {(24 + i) / 64} {31 / 64} 0.5 {38 / 64}\n")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: dark, 1: bright}}\n")
    return data


def accelerate_both(trainer):
    """Accelerates the trainer's model and its average: the callback of docs/guide/tools.md."""
    vf.accelerate(trainer.model)
    vf.accelerate(trainer.ema.ema)


def main(folder: Path) -> None:
    library("ultralytics")
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn import tasks
    from ultralytics.nn.modules.conv import CBAM

    class Trainer(DetectionTrainer):
        """Accelerates the model that the trainer builds: the trainer of docs/guide/tools.md."""

        def get_model(self, *arguments, **options):
            model = super().get_model(*arguments, **options)
            vf.accelerate(model)
            return model

    tasks.CBAM = CBAM  # Ultralytics has the class, and looks for the names in a YAML file here
    data, yaml = write_data(folder), folder / "tiny.yaml"
    yaml.write_text(CONFIGURATION)
    found = {}
    for way in ("plain", "before", "callback", "trainer"):
        kinds: dict[str, str] = {}

        def note(trainer, kinds=kinds):
            kinds["model"] = type(trainer.model.model[2]).__name__
            kinds["average"] = type(trainer.ema.ema.model[2]).__name__

        yolo = YOLO(yaml, verbose=False)
        if way == "before":
            vf.accelerate(yolo.model)
        if way == "callback":
            yolo.add_callback("on_train_start", accelerate_both)
        yolo.add_callback("on_train_batch_end", note)
        yolo.train(Trainer if way == "trainer" else None, data=str(data), project=str(folder), name=way, **OPTIONS)
        best = torch.load(folder / way / "weights" / "best.pt", weights_only=False)["model"]
        found[way] = {"kinds": kinds, "saved": type(best.model[2]).__module__}
        torch.save(best.state_dict(), folder / f"{way}.pt")
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
