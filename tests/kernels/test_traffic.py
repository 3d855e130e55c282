"""Every op's Triton launcher moves the declared bytes; `python -m tools.traffic` prints the table."""

from __future__ import annotations

import dataclasses

import pytest

from cases import INTERPRETED
from variants import BIASED
from visattn_fast import catalogue

pytest.importorskip("triton")
traffic = pytest.importorskip("tools.traffic", reason="not beside the repository's tools")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter: needs TRITON_INTERPRET=1")
ENTRIES = (*catalogue.ENTRIES.values(), *catalogue.INFERENCE.values())
CALLS = [call for entry in ENTRIES for call in traffic.calls(entry)]
CALLS += [traffic.Call(entry, traffic.SHAPE, layout) for entry in BIASED.values() for layout in catalogue.LAYOUTS]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_moves_what_is_declared(call):
    faults = [account.fault for account in traffic.accounts(call)]
    assert not any(faults), "\n".join(faults)


def test_channels_that_no_program_holds():
    """LocalAttention's backward reads x once more if no program holds all channels, over which it sums first."""
    entry = catalogue.ENTRIES["local_attention"]
    entry = dataclasses.replace(entry, arguments=lambda c: {"channels": c, "reduction": 64})  # small sums
    for shape, passes in (((1, 256, 8, 20), 4), ((1, 264, 8, 20), 5)):
        _, backward = traffic.accounts(traffic.Call(entry, shape))
        assert backward.streamed == pytest.approx(passes, rel=traffic.TOLERANCE)
