"""The memory of a run: its peak, and the bytes that it keeps for the backward pass."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Returns the bytes that a training run keeps for its backward pass.

    Each storage counts once; those of ``parameters`` do not count.
    """
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Returns the peak of what a run allocates, above what was allocated before it; None if the device cannot tell."""
    if device.type == "cpu":
        return _traced_peak(run)
    module = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return None
    module.synchronize()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    run()
    module.synchronize()
    return int(module.max_memory_allocated() - before)


def _traced_peak(run: Callable[[], object]) -> int:
    with tempfile.TemporaryDirectory() as folder, _silent_stderr():
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            run()
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silences file descriptor 2, on which the profiler's library announces itself and has no option against it."""
    sys.stderr.flush()
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
