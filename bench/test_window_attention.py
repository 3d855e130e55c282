"""Times window attention at Swin-T's four stages: fused, timm's block with roll, partition and reverse, and compiled.

``pytest bench/test_window_attention.py --benchmark-only`` needs timm. The cases are the report's, in batches of 4.
Every contender has the same weights. In mode ``both`` it returns the gradients of the map and of every parameter.
"""

from __future__ import annotations

from typing import Any

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
def test_stage(benchmark: Any, stage: tuple[int, int, int, int], contender: str, mode: str) -> None:
    library("timm.models.swin_transformer")
    contest = Contest(Case("window_attention", stage, layout="channels_last", mode=mode), DEVICE)
    run = contest.run(contender)
    assert max(contest.errors(run(), contest.oracle()).values()) < 1e-4  # same results
    measure(benchmark, run, f"{contest.case}, window 7, shifted", contest.x, heads=contest.plain.heads)
