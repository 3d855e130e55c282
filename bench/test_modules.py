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
from visattn_fast.report.contest import Contest
from visattn_fast.report.rows import bytes_moved


@timed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [name for name, entry in ENTRIES.items() if entry.epilogue])
def test_module(benchmark, op, layout, shape, dtype, mode, gate_contender):
    contest = Contest(Case(op, shape, dtype, layout, mode), DEVICE)
    run, oracle = contest.run(gate_contender), contest.oracle()
    errors = contest.errors(run(), oracle)
    ours = CONTENDERS[gate_contender].fused
    if ours:
        oracle.check(errors, contest.errors(contest.run("eager")(), oracle), contest.dtype)
    else:  # rivals set no budget for themselves, but what is timed is the same computation
        assert max(errors.values()) < torch.finfo(contest.dtype).eps ** 0.5
    measure(
        benchmark,
        run,
        str(contest.case),
        contest.x,
        bytes_moved(contest.case, gate_contender, contest.x.nbytes),
        backend=select(DEVICE.type, contest.dtype, "auto") if ours else gate_contender,
        saved_bytes=contest.saved_bytes(gate_contender, run),
        error=max(errors.values()),
    )
