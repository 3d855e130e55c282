"""The error budget: what a run may err by, and what is refused."""

from __future__ import annotations

import pytest
import torch

from visattn_fast.measure import accuracy
from visattn_fast.measure.accuracy import Oracle

EPS = torch.finfo(torch.float32).eps
Y = torch.tensor([1.0, -4.0], dtype=torch.float64)
BIAS = torch.tensor([1e-12, 0.0], dtype=torch.float64)  # a gradient that cancels
ORACLE = Oracle({"y": Y, "bias": BIAS})


def errors(**changed: float) -> dict[str, float]:
    """Returns errors of 0, except for these tensors."""
    return {"y": 0.0, "bias": 0.0, **changed}


def test_errors_are_relative_to_the_largest_value():
    """A cancelled tensor's are relative to the largest value of the run."""
    found = ORACLE.errors({"y": Y + torch.tensor([0.0, 1.0]), "bias": BIAS + torch.tensor([2.0, 0.0])})
    assert found == pytest.approx({"y": 0.25, "bias": 0.5})


@pytest.mark.parametrize(
    ("dtype", "eager", "rounded", "allowed"),
    [
        (torch.float32, 0.0, None, accuracy.UNITS * EPS),
        (torch.float32, 1e-3, None, accuracy.EAGER * 1e-3 + accuracy.UNITS * EPS),
        (torch.float32, 1e-3, 1e-3, (accuracy.EAGER + accuracy.ROUNDED) * 1e-3 + accuracy.UNITS * EPS),
        (torch.float64, 0.0, None, accuracy.UNITS_FLOAT64 * torch.finfo(torch.float64).eps),
    ],
)
def test_budget_is_eagers_error_and_a_band(dtype, eager, rounded, allowed):
    moved = None if rounded is None else {"y": Y * (1 + rounded), "bias": BIAS}
    oracle = Oracle({"y": Y, "bias": BIAS}, moved)
    oracle.check(errors(y=0.999 * allowed), errors(y=eager), dtype)
    with pytest.raises(AssertionError, match="error against float64 above the budget: y "):
        oracle.check(errors(y=1.001 * allowed), errors(y=eager), dtype)


@pytest.mark.parametrize(
    ("oracle", "name", "band"),
    [
        (ORACLE, "bias", accuracy.CANCELLED_BAND),
        # A single number of a run whose largest value is ten times as large.
        (Oracle({"y": torch.tensor([10.0, 1.0]), "bias": torch.tensor([1.0])}), "bias", 10 * accuracy.CANCELLED_BAND),
    ],
    ids=["cancelled", "single number"],
)
def test_band_is_wider_where_terms_cancel(oracle, name, band):
    allowed = band * accuracy.UNITS * EPS
    oracle.check(errors(**{name: 0.999 * allowed}), errors(), torch.float32)
    with pytest.raises(AssertionError, match=name):
        oracle.check(errors(**{name: 1.001 * allowed}), errors(), torch.float32)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "y is not finite"),
        (torch.tensor([1.0, torch.inf]), "y is not finite"),
        (torch.tensor([[1.0, -4.0]]), r"y: shape \(1, 2\), expected \(2,\)"),
    ],
)
def test_bad_results_are_refused(result, message):
    with pytest.raises(AssertionError, match=message):
        ORACLE.errors({"y": result, "bias": BIAS})


def test_empty_and_zero_tensors_have_no_error():
    exact = {"y": torch.empty(0, 3), "bias": torch.zeros(2)}
    assert Oracle(exact).errors(exact) == {"y": 0.0, "bias": 0.0}
