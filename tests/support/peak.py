"""The memory that a training step allocates."""

from __future__ import annotations

from visattn_fast import catalogue
from visattn_fast.measure.memory import peak_bytes
from visattn_fast.measure.step import step


def training_peak(name: str, shape: tuple[int, ...], layout: str) -> tuple[float, int]:
    """Returns the peak of a training step beside x and the output gradient: in x beside result and dx, and in bytes."""
    fast, _ = catalogue.ENTRIES[name].pair(shape[1])
    x = catalogue.feature_map(shape, layout).requires_grad_()
    grad = catalogue.feature_map(shape, layout, seed=1)
    run = step("both", fast, (x,), (x, *fast.parameters()), grad)
    run()  # the first call allocates buffers of libraries
    peak = peak_bytes(run, x.device)
    return peak / x.nbytes - 2, peak
