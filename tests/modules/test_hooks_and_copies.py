"""Copies of the modules, their modes, and the hooks on them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from cases import entries, feature_map
from visattn_fast import catalogue


@entries
def test_deepcopy_and_pickle_give_independent_modules(entry):
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))
        for p in twin.parameters():
            p.data.add_(1)
        assert not torch.equal(twin(x), fast(x)) or not list(twin.parameters())


@entries
def test_mode_changes_nothing_without_running_statistics(entry):
    fast, _ = entry.pair(32)
    if any(b.dtype.is_floating_point for b in fast.buffers()):
        pytest.skip("has running statistics")
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32)
    assert torch.equal(fast.eval()(x), fast.train()(x))


@entries
def test_forward_and_backward_hooks_run(entry):
    fast, _ = entry.pair(32)
    x = feature_map((2, 32, 5, 5), "nchw", torch.float32).requires_grad_()
    seen = []
    fast.register_forward_hook(lambda module, inputs, output: seen.append("forward"))
    fast.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    fast.eval()(x)
    fast.train()(x).sum().backward()
    assert seen == ["forward", "forward", "backward"]


def test_hooks_change_inputs_outputs_and_gradients():
    """Hooks of every kind, keyword arguments included, have the same effect on a fused and a reference module."""
    found = []
    for module in catalogue.ENTRIES["se"].pair(16):
        x = feature_map((2, 16, 6, 5), "nchw", torch.float32).requires_grad_()
        module.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
        module.register_forward_hook(lambda m, args, kwargs, y: 2 * y, with_kwargs=True)
        module.register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],))
        module.register_full_backward_hook(lambda m, dx, dy: (dx[0] - 1,))
        y = module(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_hook_after_accumulation_steps_in_the_backward_pass():
    """A hook that runs when the gradient of a parameter is complete can step at once and free the gradient."""
    fast, plain = catalogue.ENTRIES["cbam"].pair(16)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    plain(x).square().sum().backward()
    for p in fast.parameters():

        def step(p):
            p.data.sub_(0.1 * p.grad)
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
    fast(x).square().sum().backward()
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, q.detach() - 0.1 * q.grad)
