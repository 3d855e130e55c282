"""What every op's Triton launcher moves, held against the catalogue; `python -m tools.traffic` prints the table."""

from __future__ import annotations

import pytest

from cases import INTERPRETED
from visattn_fast import catalogue

pytest.importorskip("triton")
traffic = pytest.importorskip("tools.traffic", reason="not beside the repository's tools")

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter: needs TRITON_INTERPRET=1")
CALLS = [call for entry in catalogue.ENTRIES.values() for call in traffic.calls(entry)]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_moves_what_is_declared(call):
    faults = [account.fault for account in traffic.accounts(call)]
    assert not any(faults), "\n".join(faults)
