"""Trains a small residual network on scikit-learn's digits 0 to 4 and fine-tunes it on 5 to 9 with frozen lower layers.

    python examples/finetune_frozen.py [--attention cbam] [--epochs 6] [--pixels 16] [--seed 0]

Compares four runs: lower layers frozen or not, reference or fused modules. Exits with an error unless all frozen
parameters and running statistics stay the same bit for bit, freezing saves memory, and fused and reference start with
the same losses.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from torch import Tensor, nn

from digits import BATCH, Run, check_first_losses, digits, parse_options, print_table, train, twins
from visattn_fast.models import GATES, AttentionResNet

OLD = 5  # classes of the first training; the others are new
HEADER = ("fine-tuned", "modules", "accuracy", "ms per step", "peak MB", "parameters trained", "frozen tensors changed")


def pretrained(attention: str, epochs: int, seed: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Trains a network on the old classes. Returns its ``state_dict`` without the last layer."""
    _, model = twins(attention, seed, OLD)
    train([Run(model, epochs * (len(x) // BATCH))], x, y, epochs, seed)
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def lower_layers(model: AttentionResNet) -> nn.ModuleList:
    """The stem and all stages but the last."""
    return nn.ModuleList([model.stem, *model.stages[:-1]])


def freeze(model: AttentionResNet) -> AttentionResNet:
    """Freezes the lower layers: they need no gradient, and keep nothing for the backward pass.

    In training mode their batch norms would follow the new data, so they go into eval mode.
    """
    lower_layers(model).requires_grad_(False).eval()
    return model


def main() -> int:
    """Returns 0, or 1 if a claim fails."""
    parser = argparse.ArgumentParser(description="Fine-tuning above frozen layers: reference and fused modules.")
    parser.add_argument("--attention", default="cbam", choices=GATES)
    args = parse_options(parser, epochs=6)
    x, y, x_held_out, y_held_out = digits(args.pixels)
    old, new, new_held_out = y < OLD, y >= OLD, y_held_out >= OLD
    learned = pretrained(args.attention, args.epochs, args.seed, x[old], y[old])
    x, y, x_held_out, y_held_out = x[new], y[new] - OLD, x_held_out[new_held_out], y_held_out[new_held_out] - OLD

    runs = {}
    for layers in ("upper layers", "all layers"):
        for kind, model in zip(("reference", "fused"), twins(args.attention, args.seed, OLD), strict=True):
            model.load_state_dict(learned, strict=False)
            model = freeze(model) if layers == "upper layers" else model
            runs[layers, kind] = Run(model, args.epochs * (len(x) // BATCH))
    before = copy.deepcopy(lower_layers(runs["upper layers", "fused"].model).state_dict())
    train(list(runs.values()), x, y, args.epochs, args.seed)

    rows, failures, peaks = [], [], {}
    for (layers, kind), run in runs.items():
        peaks[layers, kind] = run.peak(x, y)
        now = lower_layers(run.model).state_dict()
        changed = sum(not torch.equal(now[key], before[key]) for key in before)
        frozen = layers == "upper layers"
        if frozen and changed:
            failures.append(f"{kind}: {changed} frozen tensors changed")
        accuracy, trained = run.accuracy(x_held_out, y_held_out), sum(p.numel() for p in run.trained)
        cells = (f"{accuracy:.1%}", f"{run.milliseconds:.1f}", f"{peaks[layers, kind] / 1e6:.1f}", f"{trained:,}")
        rows.append((layers, kind, *cells, f"{changed} of {len(before)}" if frozen else "none is frozen"))
    for kind in ("reference", "fused"):
        if peaks["upper layers", kind] >= peaks["all layers", kind]:
            failures.append(f"{kind}: frozen layers save no memory")
    for layers in ("upper layers", "all layers"):
        if failure := check_first_losses(runs[layers, "fused"], runs[layers, "reference"]):
            failures.append(f"{layers}: {failure}")
    print_table(
        HEADER,
        rows,
        f"{args.attention}: {args.epochs} epochs on the digits 0 to 4, then {args.epochs} on 5 to 9, in batches of"
        f" {BATCH}, {args.pixels} x {args.pixels} pixels, one thread, seed {args.seed}. ms: median of whole steps;"
        " peak: most bytes allocated at once by forward and backward; frozen tensors: parameters and running"
        " statistics, compared bit for bit."
        f" One of the {len(x_held_out)} held-out digits is {1 / len(x_held_out):.1%}.",
        labels=2,
    )
    for failure in failures:
        print(f"FAILED  {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
