"""The epilogue of a gate: the residual, then the activation."""

from __future__ import annotations

import pytest
import torch

from cases import with_epilogue
from visattn_fast import reference

X = torch.randn(2, 32, 4, 4)
BAD_EPILOGUES = {
    "activation": (lambda m: m(X, activation="gelu"), ValueError, r"activation must be one of .*got 'gelu'"),
    "shape": (lambda m: m(X, residual=X[:1]), ValueError, r"residual must have the shape of x, .*got \(1, 32, 4, 4\)"),
    "dtype": (
        lambda m: m(X, residual=X.int()),
        TypeError,
        r"residual must have a floating-point dtype, got torch.int32",
    ),
    "device": (
        lambda m: m(X, residual=X.to("meta")),
        ValueError,
        r"residual must be on the device of x, cpu, got meta",
    ),
}


def test_reference_epilogue_adds_and_then_activates():
    y, r = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(reference.epilogue(y, r, "relu"), (y + r).relu())
    assert torch.equal(reference.epilogue(y, r), y + r)
    assert torch.equal(reference.epilogue(y), y)


@with_epilogue
@pytest.mark.parametrize("name", BAD_EPILOGUES)
def test_bad_epilogue_raises(entry, name):
    call, error, message = BAD_EPILOGUES[name]
    with pytest.raises(error, match=message):
        call(entry.pair(32)[0])
