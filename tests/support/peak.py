"""The memory that a training step allocates."""

from __future__ import annotations

import torch

from visattn_fast.report.cases import Case
from visattn_fast.report.subject import Subject


def training_peak(op: str, shape: tuple[int, ...], layout: str) -> tuple[float, int]:
    """Returns the peak of a training step beside x and the output gradient: in x beside result and dx, and in bytes."""
    subject = Subject(Case(op, shape, "float32", layout, "both"), torch.device("cpu"))
    run = subject.run("fused")
    run()
    peak = subject.peak_bytes(run)
    return peak / subject.x.nbytes - 2, peak
