"""Mixed dtypes: autocast, bfloat16 maps with float32 parameters, a residual wider than the map."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import entries, feature_map, oracle, run, with_epilogue, within_budget


@pytest.mark.interpreted
@entries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_keeps_the_dtype_of_x(entry, dtype):
    """Under autocast the parameters stay float32, and x may be float32 or bfloat16."""
    fast, plain = entry.pair(32)
    x = feature_map((2, 32, 9, 9), "nchw", dtype)
    with torch.autocast("cpu", torch.bfloat16):
        fused, eager = run(fast, x), run(plain, x)
    assert fused["y"].dtype == dtype
    eager["y"] = eager["y"].to(dtype)  # the gates of the eager module are bfloat16
    within_budget(fused, eager, *oracle(plain, x))


@pytest.mark.interpreted
@with_epilogue
def test_wider_residual_widens_the_result(entry):
    """A bfloat16 map, float32 parameters and a float32 residual give a float32 result, without autocast too."""
    fast, plain = entry.pair(32)
    x = feature_map((2, 32, 5, 5), "nchw", torch.bfloat16)
    residual = feature_map((2, 32, 5, 5), "nchw", torch.float32, seed=2)
    # SiLU is smooth: y is rounded first, which may change its sign and so the gradient of a ReLU.
    fused = run(fast, x, residual, "silu")
    assert fused["y"].dtype == torch.float32
    assert fused["x"].dtype == torch.bfloat16
    with vf.use_backend("reference"):
        eager = run(fast, x, residual, "silu")
    within_budget(fused, eager, *oracle(plain, x, residual, "silu"))
