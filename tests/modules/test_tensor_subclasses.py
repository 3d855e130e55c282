"""Maps that are subclasses of tensors and override methods such as ``new_empty``, as MONAI's MetaTensor does."""

from __future__ import annotations

import pytest
import torch

import visattn_fast as vf
from cases import entries, feature_map
from outside import library
from variants import CUSTOM
from visattn_fast import catalogue


def narrow(make):
    """Returns a method with MONAI's arguments: the size is one tuple."""

    def method(self, size, dtype=None, device=None, requires_grad=False):
        if not isinstance(size, tuple):
            raise TypeError(f"size must be a tuple, got {size!r}")
        made = make(size, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad)
        return made.as_subclass(type(self))

    return method


class Narrow(torch.Tensor):
    """A tensor whose ``new_empty``, ``new_zeros`` and ``new_ones`` take fewer arguments than PyTorch's."""

    new_empty, new_zeros, new_ones = map(narrow, (torch.empty, torch.zeros, torch.ones))


def narrowed(x):
    return x.as_subclass(Narrow)


def meta_tensor(x):
    return library("monai.data").MetaTensor(x)


def results(module, x, grad_mode):
    """Returns y and the gradients of x and of the parameters, as plain tensors; only y without ``grad_mode``."""
    x = x.detach().requires_grad_(grad_mode)
    with torch.set_grad_enabled(grad_mode):
        y = module(x)
        found = [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])] if grad_mode else [y]
    return [t.detach().as_subclass(torch.Tensor) for t in found]


def same_as_for_a_tensor(module, subclass, grad_mode):
    module.train(grad_mode and module.training)  # running statistics would change between the calls
    x = feature_map((2, 16, 5, 5), "nchw", torch.float32)
    expected = results(module, x, grad_mode)
    torch.testing.assert_close(results(module, subclass(x), grad_mode), expected, rtol=0, atol=0)


subclasses = pytest.mark.parametrize("subclass", [narrowed, meta_tensor])
grad_modes = pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])


@entries
@subclasses
@grad_modes
def test_subclasses_give_the_same_numbers(entry, subclass, grad_mode):
    same_as_for_a_tensor(entry.pair(16)[0], subclass, grad_mode)


@entries
@subclasses
@grad_modes
def test_plain_path_takes_subclasses(entry, subclass, grad_mode):
    with vf.use_backend("reference"):
        same_as_for_a_tensor(entry.pair(16)[0], subclass, grad_mode)


@pytest.mark.parametrize("name", CUSTOM)
@subclasses
@grad_modes
def test_custom_gates_take_subclasses(name, subclass, grad_mode):
    same_as_for_a_tensor(CUSTOM[name].pair(16)[0], subclass, grad_mode)


@subclasses
def test_norm_before_a_gate_takes_subclasses(subclass):
    same_as_for_a_tensor(catalogue.INFERENCE["normed_gate"].pair(16)[0], subclass, False)
