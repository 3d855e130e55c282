"""``visattn-fast heatmap``: where a small CBAM network attends, drawn over a photograph."""

from __future__ import annotations

import argparse
import pickle
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..models import AttentionResNet
from ..models.rotation import rotation_accuracy, train_rotation
from ..reference import CBAM

_CROP = 64  # pixels of a training crop
_WIDTH = 16  # channels of the network's first stage
_TURNS = 4  # classes of its pretext task


@dataclass(frozen=True)
class Attention:
    """The gates of one CBAM for one image: ``channel`` [C], ``spatial`` [H, W], all in 0..1."""

    channel: Tensor
    spatial: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("image", metavar="IMAGE", help="a photograph")
    parser.add_argument("--out", metavar="FILE", help="the picture to write (default: IMAGE's name + -attention.png)")
    parser.add_argument("--attention", default="cbam", choices=("cbam",), help="the gate (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of the shorter side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the network and its training (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of training on the photograph (default: %(default)s)")
    parser.add_argument(
        "--weights", metavar="FILE", help=f"state_dict of an AttentionResNet of width {_WIDTH}, instead of training"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the picture. Returns 0, or 2 where a file or an option does not fit."""
    out = Path(args.out or f"{Path(args.image).stem}-attention.png")
    try:
        if args.size < _CROP or args.steps < 0:
            raise ValueError(f"--size must be at least {_CROP} and --steps at least 0, got {args.size}, {args.steps}")
        photograph = _read(args.image, args.size)
        if out.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
            raise ValueError(f"--out must end in .png, .svg, .pdf or the like, got {out}")
        image = (photograph.permute(2, 0, 1).float() / 255 - 0.5) / 0.25
        model, caption = _network(args, image)
        figure = draw(photograph, attention_maps(model, image[None]), f"{Path(args.image).name}: {caption}")
        figure.savefig(out)
    except (OSError, ValueError) as error:
        print(f"visattn-fast heatmap: {error}", file=sys.stderr)
        return 2
    print(f"{caption}\nwrote {out}")
    return 0


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor) -> list[Attention]:
    """Both gates of every CBAM in ``model``, in the order in which they run, for the first image of x.

    A fused CBAM never holds its gates as tensors, so a hook computes them from what it is given. The model is run in
    eval mode, and left as it was.
    """
    found: list[Attention] = []

    def collect(module: CBAM, inputs: tuple[Tensor, ...]) -> None:
        channel = module.channelattention(inputs[0])
        spatial = module.spatialattention(inputs[0] * channel)
        found.append(Attention(channel[0].flatten(), spatial[0, 0]))

    training = model.training
    handles = [m.register_forward_pre_hook(collect) for m in model.modules() if isinstance(m, CBAM)]
    try:
        model.eval()(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def draw(photograph: Tensor, maps: list[Attention], caption: str) -> Figure:
    """The photograph ``[H, W, 3]`` and, per CBAM, its spatial gate over it and its channel gates, sorted."""
    height, width = photograph.shape[:2]
    columns = len(maps) + 1
    figure = Figure(figsize=(4.2 * columns, 4.2 * height / width + 3.6), dpi=110, layout="constrained")
    figure.suptitle("CBAM attention", fontsize=15)
    top, bottom = figure.subplots(2, columns, height_ratios=(4.2 * height / width, 2.4))
    frame = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey = photograph.float().mean(2)
    top[0].imshow(photograph.numpy())
    top[0].set_title("photograph")
    bottom[0].axis("off")
    bottom[0].text(0, 0.95, textwrap.fill(caption, 46), va="top", fontsize=10, linespacing=1.4)
    for index, (gates, over, under) in enumerate(zip(maps, top[1:], bottom[1:], strict=True), 1):
        over.imshow(grey.numpy(), cmap="gray", extent=frame)
        drawn = over.imshow(gates.spatial.numpy(), cmap="inferno", alpha=0.65, extent=frame, interpolation="bilinear")
        bar = figure.colorbar(drawn, ax=over, orientation="horizontal", shrink=0.9, pad=0.02)
        bar.set_label(f"gate, {gates.spatial.min():.2f} to {gates.spatial.max():.2f}")
        over.set_title(f"block {index}: spatial attention, {gates.spatial.shape[1]} x {gates.spatial.shape[0]}")
        ordered = gates.channel.sort(descending=True).values.tolist()
        under.bar(range(len(ordered)), ordered, width=0.85, color="#4c6a92")
        under.set(ylim=(0, 1), xlabel="channels, sorted", ylabel="gate")
        under.set_title(f"block {index}: channel attention, {len(ordered)} channels")
        under.spines[["top", "right"]].set_visible(False)
    for axes in top:
        axes.axis("off")
    return figure


def _read(path: str, size: int) -> Tensor:
    """A picture as bytes ``[H, W, 3]``, upright, its shorter side ``size``. Raises OSError if it is none."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read {path!r}: {error}") from error
    scale = size / min(upright.size)
    width, height = (round(side * scale) for side in upright.size)
    return torch.from_numpy(np.array(upright.resize((width, height), Image.Resampling.LANCZOS)))


def _network(args: argparse.Namespace, image: Tensor) -> tuple[nn.Module, str]:
    """The network, and in words what its weights are. Raises OSError or ValueError for weights that do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = AttentionResNet(args.attention, num_classes=_TURNS, width=_WIDTH)
    if args.weights:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{args.weights} is no state_dict of this network: {reason}") from error
        return model, f"weights from {Path(args.weights).name}."
    if not args.steps:
        return model, f"untrained weights, seed {args.seed}: the attention is noise."
    train_rotation(model, image, args.steps, _CROP, args.seed)
    share = rotation_accuracy(model, image, _CROP, args.seed + 1)
    return model, (
        f"no pre-trained weights: a small network, trained on this photograph alone ({args.steps} steps, seed"
        f" {args.seed}) to tell by how many quarter turns a {_CROP} x {_CROP} crop of it was turned. It is right for"
        f" {share:.0%} of fresh crops of the photograph; chance is 25%."
    )
