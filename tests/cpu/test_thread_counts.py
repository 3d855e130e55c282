"""The native CPU kernels give the same bits with any number of threads.

`test_parity.py` tests this for modules without layers of PyTorch, whose own sums may depend on the number of threads.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import TARGETS, feature_map, layouts, threads
from variants import BIASED
from visattn_fast import catalogue

pytestmark = pytest.mark.skipif(("cpu", "cpp") not in TARGETS, reason="needs the native library")


def assert_same_bits(call):
    """Asserts that the tensors that ``call`` returns are equal with several numbers of threads."""
    runs = []
    for count in (torch.get_num_threads(), 1, 2, 3):
        with threads(count), vf.use_backend("cpp"):
            runs.append(call())
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def random(*sizes):
    """Returns tensors of values between 0 and 1 that require a gradient."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, generator=generator).requires_grad_() for size in sizes]


def forward_and_backward(function, *tensors):
    """Returns a call that gives the result and the gradients of all tensors that require one."""

    def call():
        y = function(*tensors)
        return y, *torch.autograd.grad(y.square().sum(), [t for t in tensors if t.requires_grad])

    return call


@layouts
def test_threads_do_not_change_sk(layout):
    c, d = 40, 6
    branches = [feature_map((3, c, 13, 11), layout, torch.float32, seed=seed).requires_grad_() for seed in (0, 1)]
    weights = random((d, c), (d,), (d,), (d,), (d,), (c, d), (c,), (c, d), (c,))
    for statistic in weights[3:5]:
        statistic.requires_grad_(False)
    assert_same_bits(forward_and_backward(vf.functional.sk, *branches, *weights))


@layouts
def test_threads_do_not_change_split_attention(layout):
    u = feature_map((3, 30, 9, 11), layout, torch.float32).requires_grad_()
    assert_same_bits(forward_and_backward(vf.functional.split_attention, u, *random((10, 10), (30, 10))))


@pytest.mark.parametrize("name", BIASED)
def test_threads_do_not_change_the_gradient_of_a_bias(name):
    fast, _ = BIASED[name].pair(32)
    bias = fast.weights()[-1]
    x = feature_map((3, 32, 28, 29), "nchw", torch.float32)
    assert_same_bits(lambda: torch.autograd.grad(fast(x).square().sum(), bias))


def test_threads_do_not_change_a_norm_before_a_gate():
    fast, _ = catalogue.INFERENCE["normed_gate"].pair(64)
    fast.gate = nn.Sigmoid()  # PyTorch's convolution depends on the number of threads
    x = feature_map((3, 64, 28, 29), "nchw", torch.float32)
    with torch.no_grad():
        assert_same_bits(lambda: (fast(x),))
