"""Shared by the examples: scikit-learn's digits, training runs on them, and the time and memory of a step."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from visattn_fast.measure.memory import peak_bytes
from visattn_fast.models import AttentionResNet

BATCH = 64
FIRST_STEPS = 3
FIRST_TOLERANCE = 1e-3  # at a loss near 2; another order of summation stays below, another function does not


class Run:
    """A network in training, with the loss and the seconds of each step. Parameters frozen before stay frozen."""

    def __init__(self, model: AttentionResNet, steps: int) -> None:
        self.model = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=0.05, total_steps=steps)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """Trains on one batch."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def milliseconds(self) -> float:
        """The median time of a step."""
        return statistics.median(self.seconds) * 1e3

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of images that the network classifies correctly. Puts it in eval mode."""
        return (self.model.eval()(x).argmax(1) == y).float().mean().item()

    def peak(self, x: Tensor, y: Tensor) -> int:
        """The most bytes that forward and backward of a batch allocate at once. Leaves the network as it was."""
        x, y = x[:BATCH].clone(), y[:BATCH]

        def forward_and_backward() -> object:
            return torch.autograd.grad(F.cross_entropy(self.model(x), y), self.trained)

        buffers = [buffer.clone() for buffer in self.model.buffers()]
        found = peak_bytes(forward_and_backward, x.device)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        assert found is not None
        return found


def digits(pixels: int = 8) -> list[Tensor]:
    """Loads images ``[N, 1, pixels, pixels]`` in 0..1 and labels ``[N]``: 1437 to train on, then 360 held out.

    Both sets are stratified by class. The digits have 8 x 8 pixels; other sizes are interpolated.
    """
    data = load_digits()
    images, labels = data.images[:, None].astype("float32") / 16, data.target
    x, x_held_out, y, y_held_out = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    found = [torch.as_tensor(array) for array in (x, y, x_held_out, y_held_out)]
    if pixels != 8:
        found[::2] = [F.interpolate(images, size=pixels, mode="bilinear") for images in found[::2]]
    return found


def batches(x: Tensor, y: Tensor, epochs: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields shuffled batches of `BATCH`, each shifted by up to one of the original 8 pixels."""
    steps = len(x) // BATCH
    reach = x.shape[2] // 8
    for _ in range(epochs):
        for indices in torch.randperm(len(x), generator=generator)[: steps * BATCH].view(steps, BATCH):
            shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            yield torch.roll(x[indices], shift, (2, 3)), y[indices]


def train(runs: list[Run], x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """Trains the runs on the same batches, in turn within each step. The turns rotate, so that none is always first."""
    order = list(runs)
    for images, labels in batches(x, y, epochs, torch.Generator().manual_seed(seed)):
        for run in order:
            run.step(images, labels)
        order.append(order.pop(0))


def twins(attention: str, seed: int, classes: int = 10) -> tuple[AttentionResNet, AttentionResNet]:
    """Makes a network with reference modules and one with fused modules, with equal parameters drawn from ``seed``."""
    torch.manual_seed(seed)
    reference = AttentionResNet(attention, classes, in_channels=1, fused=False)
    fused = AttentionResNet(attention, classes, in_channels=1)
    fused.load_state_dict(reference.state_dict())
    return reference, fused


def check_first_losses(a: Run, b: Run) -> str:
    """Returns a message if the first losses of two runs differ by more than rounding, else an empty string."""
    first = zip(a.losses[:FIRST_STEPS], b.losses[:FIRST_STEPS], strict=True)
    largest = max(abs(one - other) for one, other in first)
    return "" if largest <= FIRST_TOLERANCE else f"a loss of the first {FIRST_STEPS} steps is off by {largest:.1e}"


def parse_options(parser: argparse.ArgumentParser, epochs: int) -> argparse.Namespace:
    """Adds the options that the examples share, and parses the command line."""
    parser.add_argument("--epochs", type=int, default=epochs, metavar="N", help="default: %(default)s")
    parser.add_argument("--pixels", type=int, default=16, metavar="N", help="image size, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for option, least in (("epochs", 1), ("pixels", 8)):
        if getattr(args, option) < least:
            parser.error(f"argument --{option}: must be at least {least}, got {getattr(args, option)}")
    torch.set_num_threads(1)  # the maps are too small for two threads
    return args


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], note: str, labels: int = 1) -> None:
    """Prints a table and a note; all but the first ``labels`` columns are right-aligned."""
    console = Console() if sys.stdout.isatty() else Console(width=110)
    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[labels:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(note, highlight=False)
