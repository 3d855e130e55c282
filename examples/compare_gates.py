"""Trains a small residual network on scikit-learn's digits with each gate in turn, reference and fused side by side,
from the same parameters on the same batches, and prints what each costs and what it brings.

    python examples/compare_gates.py [--gates se,cbam] [--epochs 8] [--pixels 16] [--seed 0]

Exits with an error where the first losses of fused and reference differ by more than rounding. The networks are small:
their convolutions take most of a step. The modules by themselves, at ResNet-50's sizes: ``visattn-fast report``.
"""

from __future__ import annotations

import argparse
import sys

from torch import Tensor

from digits import BATCH, Run, departure, digits, parse, show, train, twins
from visattn_fast.models import GATES

WARM_UP = 3  # steps
HEADER = ("gate", "accuracy\nreference", "\nfused", "ms per step\nreference", "\nfused", "\nfaster")
HEADER += ("peak MB\nreference", "\nfused")


def compare(gate: str, epochs: int, seed: int, data: list[Tensor]) -> tuple[list[str], str]:
    """A row of the table, and what is wrong with it."""
    x, y, x_held_out, y_held_out = data
    train([Run(model, WARM_UP) for model in twins(gate, seed)], x[: WARM_UP * BATCH], y, 1, seed)  # thrown away
    reference, fused = runs = [Run(model, epochs * (len(x) // BATCH)) for model in twins(gate, seed)]
    train(runs, x, y, epochs, seed)
    peaks = [f"{run.peak(x, y) / 1e6:.1f}" for run in runs]
    times = [f"{run.milliseconds:.1f}" for run in runs]
    accuracies = [f"{run.accuracy(x_held_out, y_held_out):.1%}" for run in runs]
    faster = f"{reference.milliseconds / fused.milliseconds:.2f}x"
    return [gate, *accuracies, *times, faster, *peaks], departure(fused, reference)


def names(option: str) -> list[str]:
    """The gates of ``--gates``."""
    for name in option.split(","):
        if name not in GATES:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(GATES)}, got {name!r}")
    return option.split(",")


def main() -> int:
    """Returns 0, or 1 where fused and reference part."""
    parser = argparse.ArgumentParser(description="Each gate on the digits: accuracy, time, memory; reference, fused.")
    parser.add_argument("--gates", type=names, default=GATES, metavar="NAME[,NAME...]", help=f"of {', '.join(GATES)}")
    args = parse(parser, epochs=8)
    data = digits(args.pixels)
    rows, failures = [], []
    for gate in args.gates:
        print(f"{gate} ...", file=sys.stderr, flush=True)
        row, failure = compare(gate, args.epochs, args.seed, data)
        rows.append(row)
        if failure:
            failures.append(f"{gate}: {failure}")
    steps, held_out = len(data[0]) // BATCH, len(data[2])
    show(
        HEADER,
        rows,
        f"{args.epochs} epochs of {steps} batches of {BATCH} digits, {args.pixels} x {args.pixels} pixels, one thread,"
        f" seed {args.seed}. ms: the median of whole steps, convolutions and optimiser included; peak: what forward and"
        f" backward allocate at a time. One of the {held_out} held-out digits is {1 / held_out:.1%}, and training"
        " amplifies rounding.",
    )
    for failure in failures:
        print(f"FAILED  {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
