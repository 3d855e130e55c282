"""``torch.use_deterministic_algorithms(True)``: the plain path of every module runs no operator that raises on GPUs."""

from __future__ import annotations

import pytest
import torch

from cases import entries, feature_map, layouts
from nondeterministic import RAISING, deterministic_names
from variants import BIASED, CUSTOM
from visattn_fast import reference
from visattn_fast.reference.cbam import global_maximum


@entries
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_plain_modules_run_no_operator_that_raises(entry, training):
    plain = entry.pair(16)[1].train(training)
    x = feature_map((2, 16, 8, 8), "nchw", torch.float32).requires_grad_()
    assert not RAISING & deterministic_names(lambda: plain(x).sum().backward())


@pytest.mark.parametrize("entry", [*BIASED.values(), *CUSTOM.values()], ids=lambda e: e.reference.__name__)
def test_plain_functions_run_no_operator_that_raises(entry):
    """The functional forms, and gates whose mathematics the caller brings."""
    plain = entry.pair(16)[1]
    x = feature_map((2, 16, 8, 8), "nchw", torch.float32).requires_grad_()
    assert not RAISING & deterministic_names(lambda: plain(x).sum().backward())


def test_functional_channel_attention_runs_no_operator_that_raises():
    plain = reference.ChannelAttention(16, reduction=4)
    x = feature_map((2, 16, 8, 8), "nchw", torch.float32).requires_grad_()
    call = lambda: reference.channel_attention(x, *plain.weights()).sum().backward()  # noqa: E731
    assert not RAISING & deterministic_names(call)


@layouts
def test_the_first_of_equal_maxima_gets_the_gradient(layout):
    """Both forms of the maximum give the same values and gradients, also for ties and NaN."""
    x = feature_map((3, 5, 4, 6), layout, torch.float32).mul(2).round()
    x[0, 0, 1, 2] = torch.nan
    results = []

    def step():
        leaf = x.clone().requires_grad_()
        y = global_maximum(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, leaf, torch.arange(15.0).view(3, 5, 1, 1))])

    step()
    names = deterministic_names(step)
    assert "adaptive_max_pool2d" not in names
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
