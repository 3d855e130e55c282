"""Opacus finds the per-sample gradients of the layers inside gates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visattn_fast as vf
from outside import library
from twins import TWINS, images, twins

pytestmark = pytest.mark.filterwarnings("ignore")
REFUSED = ("timm_swin", "timm_cbam")  # the plain networks, too: for a buffer, and for timm's own batch norm


def per_sample_gradients(model):
    model = library("opacus").GradSampleModule(model)
    model(images()).square().sum().backward()
    return {name: p.grad_sample for name, p in model.named_parameters()}


def prepared(model):
    """Does what Opacus asks for: batch norms become group norms, and no activation works in place."""
    torch.manual_seed(0)
    model = library("opacus.validators").ModuleValidator.fix(model).double().train()
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.bias)  # a group of one value would be zero, where ReLU bends
    return model


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("name", [name for name in TWINS if name not in REFUSED])
def test_per_sample_gradients(name, when):
    """``when``: layers are replaced after, or before, the model is accelerated."""
    plain, fast = twins(name)
    fast = prepared(fast if when == "after" else copy.deepcopy(plain))
    if when == "before":
        vf.accelerate(fast)
    torch.testing.assert_close(per_sample_gradients(fast), per_sample_gradients(prepared(plain)))
