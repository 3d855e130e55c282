"""``visattn-fast heatmap``: where small networks with attention attend, drawn over a photograph."""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..models import GATES, AttentionResNet
from ..models.resnet import AttentionBlock
from ..models.rotation import rotation_accuracy, train_rotation
from .overlays import Network, View, draw, file_types
from .places import make_writable

_CROP = 64  # pixels of a training crop
_WIDTH = 16  # channels of the network's first stage
_STEPS, _STEPS_OF_MANY = 200, 100
_TURNS = 4  # classes of its pretext task
_LEGEND = (
    "A block's gates act on its features, at the size in its title. The colours of a map run from its 1st to its 99th"
    " percentile, and span at least a tenth of its largest value: compare the numbers, not the shades."
    " Modules without a map show how much of a pixel's features they let through. Each bar is one channel."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("image", metavar="IMAGE", help="a photograph")
    parser.add_argument("--out", metavar="FILE", help="picture to write (default: IMAGE's name + -attention.png)")
    parser.add_argument(
        "--attention",
        default="cbam",
        metavar="NAME[,NAME...]",
        help=f"one gate, several, or all: {', '.join(GATES)} (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=224, help="pixels of the shorter side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of network and training (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"training steps on the photograph (default: {_STEPS} for one gate, {_STEPS_OF_MANY} for each of several)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=f"state_dict of an AttentionResNet of width {_WIDTH}: load it, do not train",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the picture. Returns 0, or 2 for a bad file or option."""
    out = Path(args.out or f"{Path(args.image).stem}-attention.png")
    try:
        names = _names(args.attention)
        if args.steps is None:
            args.steps = _STEPS if len(names) == 1 else _STEPS_OF_MANY
        if args.size < _CROP or args.steps < 0:
            raise ValueError(f"--size must be at least {_CROP} and --steps at least 0, got {args.size}, {args.steps}")
        if args.weights and len(names) > 1:
            raise ValueError(f"--weights needs a single gate, got --attention {args.attention}")
        photograph = _read(args.image, args.size)
        if out.suffix[1:].lower() not in file_types():
            raise ValueError(f"--out must end in .png, .svg, .pdf or the like, got {out}")
        make_writable(out.parent, "--out")
        image = (photograph.permute(2, 0, 1).float() / 255 - 0.5) / 0.25
        caption = _caption(args, len(names))
        print(caption, flush=True)
        networks = []
        for name in names:
            model, note = _network(name, args, image)
            print(f"{name}: {note}" if note else name, flush=True)
            networks.append(Network(name, note, views(model, image[None])))
        draw(photograph, networks, f"{Path(args.image).name}: {caption}\n\n{_LEGEND}").savefig(out)
    except (OSError, ValueError) as error:
        print(f"visattn-fast heatmap: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


@torch.no_grad()
def views(model: AttentionResNet, x: Tensor) -> list[View]:
    """Shows every gate of ``model`` at work on the first image of x, in the order in which the gates run.

    Runs the model in eval mode, and leaves it as it was.
    """
    found = []

    def look(gate: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        before = inputs[0][:1]
        after = gate.forward(before)  # without the block's epilogue, and without this hook
        gain = after.norm(dim=1) / before.norm(dim=1).clamp_min(torch.finfo(before.dtype).tiny)
        found.append(View(gate.attention(before), gain[0]))  # type: ignore[operator]

    modes = {module: module.training for module in model.modules()}
    blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    handles = [block.gate.register_forward_hook(look) for block in blocks]
    try:
        model.eval()(x)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return found


def _names(attention: str) -> tuple[str, ...]:
    """Parses ``--attention`` into names of gates. Raises ValueError for an unknown name."""
    names = GATES if attention == "all" else tuple(attention.split(","))
    for name in names:
        if name not in GATES:
            raise ValueError(f"--attention must be all, or names among {', '.join(GATES)}, got {name!r}")
    return names


def _read(path: str, size: int) -> Tensor:
    """Reads a picture as bytes ``[H, W, 3]``, upright, its shorter side ``size``. Raises OSError if it cannot."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"cannot read {path!r}: {error}") from error
    scale = size / min(upright.size)
    width, height = (round(side * scale) for side in upright.size)
    return torch.from_numpy(np.array(upright.resize((width, height), Image.Resampling.LANCZOS)))


def _caption(args: argparse.Namespace, count: int) -> str:
    """Says in words where the weights of the networks come from."""
    if args.weights:
        return f"weights from {Path(args.weights).name}."
    if not args.steps:
        return f"untrained weights, seed {args.seed}: the attention is noise."
    networks = "a small network, trained" if count == 1 else "small networks, each trained"
    return (
        f"no pre-trained weights: {networks} on this photograph alone ({args.steps} steps, seed {args.seed})"
        f" to tell by how many quarter turns a {_CROP} x {_CROP} crop of it is rotated; chance is 25%."
    )


def _network(name: str, args: argparse.Namespace, image: Tensor) -> tuple[AttentionResNet, str]:
    """Builds the network, with a note on its accuracy. Raises OSError or ValueError for weights that do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = AttentionResNet(name, num_classes=_TURNS, width=_WIDTH)
    if args.weights:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{args.weights} is not a state_dict of this network: {reason}") from error
    if args.weights or not args.steps:
        return model, ""
    train_rotation(model, image, args.steps, _CROP, args.seed)
    return model, f"right for {rotation_accuracy(model, image, _CROP, args.seed + 1):.0%} of fresh crops"
