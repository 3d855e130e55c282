"""What counts operations, parameters and layers counts the same in fused models as in plain ones."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import visattn_fast as vf
from outside import library
from twins import TWINS, images, twins

pytestmark = pytest.mark.filterwarnings("ignore")
X = images(torch.float32)


def flops(model, backward):
    with FlopCounterMode(display=False) as counter:
        y = model(X)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


def by_fvcore(model):
    analysis = library("fvcore.nn").FlopCountAnalysis(model, X).unsupported_ops_warnings(False)
    return {name: count for name, count in analysis.by_module().items() if count}


def by_thop(model):
    return library("thop").profile(model, (X,), verbose=False)


def by_ptflops(model):
    count = library("ptflops").get_model_complexity_info
    return count(model, tuple(X.shape[1:]), as_strings=False, print_per_layer_stat=False, backend="pytorch")


def by_torchinfo(model):
    found = library("torchinfo").summary(model, input_data=X, verbose=0)
    return [(layer.var_name, layer.output_size, layer.num_params, layer.macs) for layer in found.summary_list]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("name", TWINS)
def test_flop_counter_mode(name, backward):
    plain, fast = twins(name, torch.float32)
    assert flops(fast, backward) == flops(plain, backward)


@pytest.mark.parametrize("counter", [by_thop, by_torchinfo], ids=lambda c: c.__name__[3:])
@pytest.mark.parametrize("name", TWINS)
def test_counts_by_hooks(name, counter):
    plain, fast = (model.eval() for model in twins(name, torch.float32))
    assert counter(fast) == counter(plain)


@pytest.mark.parametrize("counter", [by_fvcore, by_ptflops], ids=lambda c: c.__name__[3:])
@pytest.mark.parametrize("name", TWINS)
def test_counts_of_operators(name, counter):
    """fvcore and ptflops know PyTorch's operators alone: the reference backend shows them."""
    plain, fast = (model.eval() for model in twins(name, torch.float32))
    want = counter(plain)
    with vf.use_backend("reference"):
        assert counter(fast) == want
