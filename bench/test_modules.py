"""Every gated module by every contender, in both layouts and several modes: side by side in a group.

``pytest bench --benchmark-only``, with ``--all-shapes`` for every size; ``--modes``, ``--contenders`` and ``--dtypes``
as for ``visattn-fast report``, whose cases, check against float64 and clock these are: docs/guide/benchmarks.md.
"""

from __future__ import annotations

import pytest
import torch

from bench.clock import DEVICE, measure, timed
from visattn_fast.backends import select
from visattn_fast.catalogue import ENTRIES, LAYOUTS
from visattn_fast.report.cases import CONTENDERS, Case
from visattn_fast.report.measure import bytes_moved
from visattn_fast.report.subject import Subject


@timed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [name for name, entry in ENTRIES.items() if entry.epilogue])
def test_module(benchmark, op, layout, shape, dtype, mode, gate_contender):
    subject = Subject(Case(op, shape, dtype, layout, mode), DEVICE)
    run, oracle = subject.run(gate_contender), subject.oracle()
    errors = subject.errors(run(), oracle)
    ours = CONTENDERS[gate_contender].fused
    if ours:
        subject.check(errors, subject.errors(subject.run("eager")(), oracle))
    else:  # rivals set no budget for themselves, but what is timed is the same computation
        assert max(errors.values()) < torch.finfo(subject.dtype).eps ** 0.5
    measure(
        benchmark,
        run,
        str(subject.case),
        subject.x,
        bytes_moved(subject.case, gate_contender, subject.x.nbytes),
        backend=select(DEVICE.type, subject.dtype, "auto") if ours else gate_contender,
        saved_bytes=subject.saved_bytes(gate_contender, run),
        error=max(errors.values()),
    )
