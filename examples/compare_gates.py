"""Trains a small residual network on scikit-learn's digits with each gate in turn; prints accuracy, time and memory.

    python examples/compare_gates.py [--gates se,cbam] [--epochs 8] [--pixels 16] [--seed 0]

For each gate a network with reference modules and one with fused modules train side by side, from the same parameters
on the same batches. Exits with an error if their first losses differ by more than rounding. The networks are small, and
their convolutions take most of a step; ``visattn-fast report`` measures the modules alone, at ResNet-50's sizes.
"""

from __future__ import annotations

import argparse
import sys

from torch import Tensor

from digits import BATCH, Run, check_first_losses, digits, parse_options, print_table, train, twins
from visattn_fast.models import GATES

WARM_UP = 3  # steps
HEADER = (
    "gate",
    "accuracy\nreference",
    "\nfused",
    "ms per step\nreference",
    "\nfused",
    "\nfaster",
    "peak MB\nreference",
    "\nfused",
)


def compare(gate: str, epochs: int, seed: int, data: list[Tensor]) -> tuple[list[str], str]:
    """Trains both networks with ``gate``. Returns a row of the table, and a failure or an empty string."""
    x, y, x_held_out, y_held_out = data
    train([Run(model, WARM_UP) for model in twins(gate, seed)], x[: WARM_UP * BATCH], y, 1, seed)  # thrown away
    reference, fused = runs = [Run(model, epochs * (len(x) // BATCH)) for model in twins(gate, seed)]
    train(runs, x, y, epochs, seed)
    peaks = [f"{run.peak(x, y) / 1e6:.1f}" for run in runs]
    times = [f"{run.milliseconds:.1f}" for run in runs]
    accuracies = [f"{run.accuracy(x_held_out, y_held_out):.1%}" for run in runs]
    faster = f"{reference.milliseconds / fused.milliseconds:.2f}x"
    return [gate, *accuracies, *times, faster, *peaks], check_first_losses(fused, reference)


def parse_gates(option: str) -> list[str]:
    """Parses ``--gates``."""
    for name in option.split(","):
        if name not in GATES:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(GATES)}, got {name!r}")
    return option.split(",")


def main() -> int:
    """Returns 0, or 1 if the losses of fused and reference differ."""
    parser = argparse.ArgumentParser(description="Accuracy, time and memory with each gate: reference, fused.")
    parser.add_argument(
        "--gates", type=parse_gates, default=GATES, metavar="NAME[,NAME...]", help=f"of {', '.join(GATES)}"
    )
    args = parse_options(parser, epochs=8)
    data = digits(args.pixels)
    rows, failures = [], []
    for gate in args.gates:
        print(f"{gate} ...", file=sys.stderr, flush=True)
        row, failure = compare(gate, args.epochs, args.seed, data)
        rows.append(row)
        if failure:
            failures.append(f"{gate}: {failure}")
    steps, held_out = len(data[0]) // BATCH, len(data[2])
    print_table(
        HEADER,
        rows,
        f"{args.epochs} epochs of {steps} batches of {BATCH} digits, {args.pixels} x {args.pixels} pixels, one thread,"
        f" seed {args.seed}. ms: median of whole steps, convolutions and optimiser included; peak: most bytes allocated"
        f" at once by forward and backward. One of the {held_out} held-out digits is {1 / held_out:.1%}, and training"
        " amplifies rounding.",
    )
    for failure in failures:
        print(f"FAILED  {failure}", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
