"""Window attention at Swin-T's four stages: ours, timm's block with roll, partition and reverse, and that compiled.

``pytest bench/test_window_attention.py --benchmark-only``; it needs timm. The report's case, in batches of 4: every
contender has the same weights, and in mode ``both`` gives the gradients of the map and of every parameter.
"""

from __future__ import annotations

import pytest

from bench.clock import DEVICE, measure, timed
from outside import library
from visattn_fast.catalogue import ENTRIES
from visattn_fast.report.cases import Case
from visattn_fast.report.contest import Contest

CONTENDERS = ("timm", "timm-compile", "fused")


@timed
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("stage", ENTRIES["window_attention"].shapes, ids=lambda s: "x".join(map(str, s)))
def test_stage(benchmark, stage, contender, mode):
    library("timm.models.swin_transformer")
    contest = Contest(Case("window_attention", stage, layout="channels_last", mode=mode), DEVICE)
    run = contest.run(contender)
    assert max(contest.errors(run(), contest.oracle()).values()) < 1e-4  # what is timed is the same computation
    measure(benchmark, run, f"{contest.case}, window 7, shifted", contest.x, heads=contest.plain.heads)
