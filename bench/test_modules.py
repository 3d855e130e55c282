"""Every gated module by every contender, forward and forward + backward, in both layouts: side by side in a group.

``pytest bench --benchmark-only``, with ``--all-shapes`` for every size. The cases, the check against float64 and, on a
GPU, the clock are those of ``visattn-fast report``; there the times are of the device, with a cold L2, not of launches.
"""

from __future__ import annotations

import statistics

import pytest
import torch

from bench.clock import DEVICE, measure, timed
from visattn_fast.backends import select
from visattn_fast.catalogue import ENTRIES, LAYOUTS
from visattn_fast.report.cases import CONTENDERS, MODES, Case
from visattn_fast.report.measure import bytes_moved
from visattn_fast.report.subject import Subject
from visattn_fast.report.timing import Effort, interleaved

COPY = Effort(seconds=0.2, fewest=5, most=20)


@timed
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [name for name, entry in ENTRIES.items() if entry.epilogue])
def test_module(benchmark, op, layout, mode, contender, shape):
    dtype = "float32" if DEVICE.type == "cpu" else "bfloat16"
    subject = Subject(Case(op, shape, dtype, layout, mode), DEVICE)
    run, oracle = subject.run(contender), subject.oracle()
    errors = subject.errors(run(), oracle)
    if contender == "fused":
        subject.check(errors, subject.errors(subject.run("eager")(), oracle))
    else:  # rivals set no budget for themselves, but what is timed is the same computation
        assert max(errors.values()) < torch.finfo(subject.dtype).eps ** 0.5
    copy = statistics.median(interleaved({"copy": subject.run("copy")}, DEVICE, COPY)["copy"])
    benchmark.group = str(subject.case)
    benchmark.extra_info.update(
        device=torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else DEVICE.type,
        backend=select(DEVICE.type, subject.dtype, "auto") if contender == "fused" else contender,
        copy_ms=copy * 1e3,
        x_bytes=subject.x.nbytes,
        bytes=bytes_moved(subject.case, contender, subject.x.nbytes),
        saved_bytes=subject.saved_bytes(contender, run),
        error=max(errors.values()),
    )
    measure(benchmark, run)
