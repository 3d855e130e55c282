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

_CROP = 64  # pixels of a training crop
_WIDTH = 16  # channels of the network's first stage
_STEPS, _STEPS_OF_MANY = 200, 100
_TURNS = 4  # classes of its pretext task
_LEGEND = (
    "A block's gates act on its features, at the size that its title names. The colours of a map span its values, the"
    " lowest and the highest hundredth aside, and at least a tenth of the largest: compare the numbers, not the shades."
    " Modules that have no map show how much of a pixel's features they let through. There is a bar for every channel."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("image", metavar="IMAGE", help="a photograph")
    parser.add_argument("--out", metavar="FILE", help="the picture to write (default: IMAGE's name + -attention.png)")
    parser.add_argument(
        "--attention",
        default="cbam",
        metavar="NAME[,NAME...]",
        help=f"the gate, or several, or all of them: {', '.join(GATES)} (default: %(default)s)",
    )
    parser.add_argument("--size", type=int, default=224, help="pixels of the shorter side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the network and its training (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of training on the photograph (default: {_STEPS} for one gate, {_STEPS_OF_MANY} for each of several)",
    )
    parser.add_argument(
        "--weights", metavar="FILE", help=f"state_dict of an AttentionResNet of width {_WIDTH}, instead of training"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the picture. Returns 0, or 2 where a file or an option does not fit."""
    out = Path(args.out or f"{Path(args.image).stem}-attention.png")
    try:
        names = _names(args.attention)
        if args.steps is None:
            args.steps = _STEPS if len(names) == 1 else _STEPS_OF_MANY
        if args.size < _CROP or args.steps < 0:
            raise ValueError(f"--size must be at least {_CROP} and --steps at least 0, got {args.size}, {args.steps}")
        if args.weights and len(names) > 1:
            raise ValueError(f"--weights are those of one network, got --attention {args.attention}")
        photograph = _read(args.image, args.size)
        if out.suffix[1:].lower() not in file_types():
            raise ValueError(f"--out must end in .png, .svg, .pdf or the like, got {out}")
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
    """What every gate of ``model`` makes of the first image of x, in the order in which they run.

    The model is run in eval mode, and left as it was.
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
    """The gates that ``--attention`` names. Raises ValueError for an unknown one."""
    names = GATES if attention == "all" else tuple(attention.split(","))
    for name in names:
        if name not in GATES:
            raise ValueError(f"--attention must be all or among {', '.join(GATES)}, got {name!r}")
    return names


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


def _caption(args: argparse.Namespace, count: int) -> str:
    """What the weights of the networks are, in words."""
    if args.weights:
        return f"weights from {Path(args.weights).name}."
    if not args.steps:
        return f"untrained weights, seed {args.seed}: the attention is noise."
    networks = "a small network, trained" if count == 1 else "small networks, each trained"
    return (
        f"no pre-trained weights: {networks} on this photograph alone ({args.steps} steps, seed {args.seed})"
        f" to tell by how many quarter turns a {_CROP} x {_CROP} crop of it was turned; chance is 25%."
    )


def _network(name: str, args: argparse.Namespace, image: Tensor) -> tuple[AttentionResNet, str]:
    """The network, and what can be said of it. Raises OSError or ValueError for weights that do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = AttentionResNet(name, num_classes=_TURNS, width=_WIDTH)
    if args.weights:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{args.weights} is no state_dict of this network: {reason}") from error
    if args.weights or not args.steps:
        return model, ""
    train_rotation(model, image, args.steps, _CROP, args.seed)
    return model, f"right for {rotation_accuracy(model, image, _CROP, args.seed + 1):.0%} of fresh crops"
