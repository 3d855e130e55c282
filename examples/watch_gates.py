"""Shows the gates of a small residual network on scikit-learn's digits, in training and for one digit.

    python examples/watch_gates.py [--attention cbam] [--epochs 2] [--seed 0]

``vf.watch_gates`` logs their statistics during training; the last gate is dead on purpose, and the log warns of it.
``vf.attention_maps`` then returns every gate for one held-out digit.
"""

from __future__ import annotations

import argparse
import logging
import sys

import torch

import visattn_fast as vf
from digits import BATCH, Run, digits, parse_options, train
from visattn_fast.models import GATES, AttentionResNet


def main() -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(description="Every gate: statistics in training, then shape and range.")
    parser.add_argument("--attention", default="cbam", choices=GATES)
    args = parse_options(parser, epochs=2)
    x, y, x_held_out, _ = digits(args.pixels)
    torch.manual_seed(args.seed)
    model = AttentionResNet(args.attention, in_channels=1)
    last = model.stages[-1][-1].gate.requires_grad_(False)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()

    logging.basicConfig(level=logging.INFO, format="%(levelname)-7s %(message)s", stream=sys.stdout)
    steps = len(x) // BATCH
    with vf.watch_gates(model, every=steps):  # the one line to add to a training
        train([Run(model, args.epochs * steps)], x, y, args.epochs, args.seed)

    print()
    for name, gate in vf.attention_maps(model, x_held_out[:1]).items():
        print(f"{name:<24} {tuple(gate.shape)!s:<16} {gate.min():.3f} to {gate.max():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
