"""Runs each module again and again, forward and backward, and counts the runs whose bits differ.

Run it as ``python -m tools.determinism``, or with ``make determinism``. Both the fused and the plain module run under
``torch.use_deterministic_algorithms(True)``. The first number of a cell counts runs that differ with the same number of
threads, the second those that differ from one thread. "raises": PyTorch has no deterministic algorithm. The exit status
is 1 if a fused run differs with the same number of threads, or at all if PyTorch computes no sums inside the module.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visattn_fast import catalogue

THREADS = (1, 2, 3, 8)
SHAPE = (3, 32, 15, 17)
# Modules in which PyTorch multiplies matrices on CPUs, in an op or in a gate: its sums depend on the threads.
PRODUCTS = ("criss_cross", "normed_gate")


class Differences(NamedTuple):
    """How many runs differ from the first one with as many threads, and from that with one thread.

    Attributes:
        raises: True if PyTorch refuses to run the module deterministically.
    """

    repeats: int = 0
    threads: int = 0
    raises: bool = False

    def __str__(self) -> str:
        return "raises" if self.raises else f"{self.repeats} / {self.threads}"


def results(module: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Returns y and, for training, the gradients of x and of every parameter."""
    if not training:
        with torch.no_grad():
            return [module(x)]
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def differences(module: nn.Module, x: Tensor, repeats: int, training: bool = True) -> Differences:
    """Runs the module ``repeats`` times with each number of threads, and counts the runs that differ."""
    counts, before = [0, 0], torch.get_num_threads()
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    alone: list[Tensor] = []
    try:
        for threads in THREADS if x.device.type == "cpu" else (before,):
            torch.set_num_threads(threads)
            first = results(module, x, training)
            alone = alone or first
            for _ in range(repeats):
                again = results(module, x, training)
                counts[0] += not all(map(torch.equal, first, again))
                counts[1] += not all(map(torch.equal, alone, again))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return Differences(raises=True)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(enabled)
    return Differences(*counts)


def faults(entry: catalogue.Entry, fused: Differences) -> bool:
    """True if the fused module differs where it must not."""
    free = entry.has_torch_layers or entry.name in PRODUCTS
    return fused.raises or fused.repeats > 0 or (fused.threads > 0 and not free)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    entries = [*catalogue.ENTRIES.values(), *catalogue.INFERENCE.values()]
    print("| module | dtype | layout | fused | plain |\n| --- | --- | --- | --- | --- |")
    runs = failed = 0
    for entry in (e for e in entries if e.supports(SHAPE)):
        for dtype in (torch.float32, torch.bfloat16):
            for layout in catalogue.LAYOUTS:
                x = catalogue.feature_map(SHAPE, layout, dtype, args.device)
                pair = (m.to(args.device) for m in entry.pair(SHAPE[1], dtype))
                fused, plain = (differences(m, x, args.repeats, not entry.inference) for m in pair)
                name = str(dtype).removeprefix("torch.")
                print(f"| {entry.name} | {name} | {layout} | {fused} | {plain} |", flush=True)
                runs += args.repeats * (len(THREADS) if args.device == "cpu" else 1)
                failed += faults(entry, fused)
    print(f"{runs} fused runs, {failed} cases that differ where they must not")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
