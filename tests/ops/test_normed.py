"""A gate of the channels' means behind a batch norm where no gradient is wanted: the norm is part of its passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import (
    EPILOGUES,
    TARGETS,
    VIEWS,
    feature_map,
    needs_dtype,
    oracle,
    poisoned,
    recorded_ops,
    run,
    within_budget,
)
from visattn_fast import catalogue

ENTRY = catalogue.INFERENCE["normed_gate"]
layouts = pytest.mark.parametrize("layout", catalogue.LAYOUTS)
targets = pytest.mark.parametrize(("device", "backend"), TARGETS)


def hold(x: torch.Tensor, backend: str, residual: torch.Tensor | None = None, activation: str | None = None) -> Any:
    """The result within the error budget, in x's layout, and by the two passes; returns it."""
    fast, plain = (m.to(x.device) for m in ENTRY.pair(x.shape[1], x.dtype))
    with vf.use_backend(backend), poisoned(), torch.no_grad(), recorded_ops() as names:
        y = fast(x, residual=residual, activation=activation)
    assert tuple(names) == ENTRY.ops
    exact, rounded = oracle(plain, x, residual, activation)
    eager = run(plain, x, residual, activation)
    within_budget({"y": y}, *({"y": found["y"]} for found in (eager, exact, rounded)))
    return y


@targets
@layouts
@pytest.mark.parametrize(("with_residual", "activation"), EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_epilogues(dtype, with_residual, activation, layout, device, backend):
    needs_dtype(backend, device, dtype)
    residual = feature_map((2, 24, 7, 6), layout, dtype, device, seed=2) if with_residual else None
    x = feature_map((2, 24, 7, 6), layout, dtype, device)
    y = hold(x, backend, residual, activation)
    assert y.stride() == x.stride()


@targets
@layouts
@pytest.mark.parametrize("shape", [(3, 5, 7, 5), (1, 64, 13, 17), (2, 33, 1, 1), (1, 1, 3, 3), (0, 8, 4, 4)], ids=str)
def test_shapes(shape, layout, device, backend):
    hold(feature_map(shape, layout, torch.float32, device), backend)


@targets
@layouts
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, layout, device, backend):
    x = VIEWS[view](feature_map((2, 8, 6, 5), layout, torch.float32, device), layout)
    hold(x, backend, feature_map((2, 8, 6, 5), "nchw", torch.float32, device, seed=2), "relu")


def test_deterministic_and_far_from_zero():
    """The same bits with any number of threads; where the mean is large, the error is that of a sum of such values."""
    fast, plain = ENTRY.pair(64)
    x = 1000 + feature_map((3, 64, 28, 29), "nchw", torch.float32)
    for module in (fast, plain):
        module.norm.running_mean += 1000
        module.gate = nn.Sigmoid()  # PyTorch's convolution is not the same with any number of threads
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(fast(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
    exact = plain.double()(x.double())
    assert (results[0] - exact).abs().max() < 4 * 1000 * torch.finfo(torch.float32).eps


def test_where_a_gradient_is_wanted():
    """The plain form serves, whichever of the inputs wants it."""
    fast, plain = ENTRY.pair(8, torch.float64)
    x, residual = (feature_map((2, 8, 5, 4), "nchw", torch.float64, seed=i) for i in range(2))
    for wanted in ("x", "residual", "norm.weight", "gate.0.weight"):
        found = []
        for module in (fast, plain):
            module.requires_grad_(False)
            inputs = {"x": x.clone(), "residual": residual.clone(), **dict(module.named_parameters())}
            leaf = inputs[wanted].requires_grad_()
            if module is fast:
                y = module(inputs["x"], residual=inputs["residual"], activation="silu")
            else:
                y = vf.reference.epilogue(module(inputs["x"]), inputs["residual"], "silu")
            found.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_a_wider_residual():
    """It widens the result, whose sum is PyTorch's."""
    fast, plain = ENTRY.pair(8)
    x, residual = feature_map((2, 8, 5, 4), "nchw", torch.bfloat16), feature_map((2, 8, 5, 4), "nchw", torch.float32)
    with torch.no_grad(), recorded_ops() as names:
        fast.gate = plain.gate = nn.Sigmoid()
        y = fast(x, residual=residual)
    assert names == []
    torch.testing.assert_close(y, plain(x.float()) + residual, rtol=0.01, atol=0.01)
