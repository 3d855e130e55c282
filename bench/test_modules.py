"""Times every gated module by every contender, in both layouts and several modes; a group compares the contenders.

``pytest bench --benchmark-only``; ``--all-shapes`` runs every size. ``--modes``, ``--contenders`` and ``--dtypes`` are
those of ``visattn-fast report``, and so are the cases, the check against float64 and the clock:
docs/guide/benchmarks.md.
"""

from __future__ import annotations

from typing import Any

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
def test_module(
    benchmark: Any, op: str, layout: str, shape: tuple[int, int, int, int], dtype: str, mode: str, gate_contender: str
) -> None:
    contest = Contest(Case(op, shape, dtype, layout, mode), DEVICE)
    run, oracle = contest.run(gate_contender), contest.oracle()
    errors = contest.errors(run(), oracle)
    fused = CONTENDERS[gate_contender].fused
    if fused:
        oracle.check(errors, contest.errors(contest.run("eager")(), oracle), contest.dtype)
    else:  # no error budget for rivals, but they must compute the same
        assert max(errors.values()) < torch.finfo(contest.dtype).eps ** 0.5
    measure(
        benchmark,
        run,
        str(contest.case),
        contest.x,
        bytes_moved(contest.case, gate_contender, contest.x.nbytes),
        backend=select(DEVICE.type, contest.dtype, "auto") if fused else gate_contender,
        saved_bytes=contest.saved_bytes(gate_contender, run),
        error=max(errors.values()),
    )
