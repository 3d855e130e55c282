"""PyTorch's counter of floating-point operations: fused modules count what their plain twins count."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils import flop_counter

import visattn_fast as vf
from cases import RecordedOps, entries, feature_map, with_epilogue
from variants import BIASED, CUSTOM
from visattn_fast import catalogue, reference
from visattn_fast.ops.library import OPS

CHANNELS = 16


class Untracked:
    """Takes the place of the counter's ModuleTracker, whose global hooks make fused modules call their layers."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def counted(function, tracked=False):
    """Returns the result of a function, and its count. Ops serve fused modules unless modules are ``tracked``."""
    counter = flop_counter.FlopCounterMode(display=False)
    if not tracked:
        counter.mod_tracker = Untracked()
    with counter:
        result = function()
    return result, counter.get_total_flops()


def counts(module, training=True, grad_mode=True, tracked=False, **epilogue):
    """Returns the counts of forward and, with ``grad_mode``, of backward; then the names of our ops that ran."""
    module.train(training)
    # Whole windows: the plain layers of window attention also compute padding, which the fused ones leave out.
    size = 14 if isinstance(module, reference.WindowAttention2d) else 8
    x = feature_map((2, CHANNELS, size, size), "nchw", torch.float32).requires_grad_(grad_mode)
    with torch.set_grad_enabled(grad_mode), RecordedOps() as ops:
        y, forward = counted(lambda: module(x, **epilogue), tracked)
        backward = counted(y.sum().backward, tracked)[1] if grad_mode else 0
    return (forward, backward), ops.names


def same_counts(pair, **options):
    (fused, names), (plain, others) = (counts(module, **options) for module in pair)
    assert names
    assert not others
    assert fused == plain


modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
grad_modes = pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])


@entries
@modes
@grad_modes
def test_modules_count_what_their_plain_twins_count(entry, training, grad_mode):
    same_counts(entry.pair(CHANNELS), training=training, grad_mode=grad_mode)


@entries
def test_tracked_modules_count_what_their_plain_twins_count(entry):
    """The counter as users make it, with its hooks on every module."""
    fast, plain = entry.pair(CHANNELS)
    assert counts(fast, tracked=True)[0] == counts(plain, tracked=True)[0]


@pytest.mark.parametrize("entry", [*BIASED.values(), *CUSTOM.values()], ids=lambda e: e.fast.__name__)
@modes
@grad_modes
def test_biased_and_custom_gates_count_what_plain_ones_count(entry, training, grad_mode):
    same_counts(entry.pair(CHANNELS), training=training, grad_mode=grad_mode)


def test_norm_then_gate_counts_what_plain_pytorch_counts():
    """`gate_normed_channels`, and the op that applies a batch norm before squeeze-and-excitation."""
    same_counts(catalogue.INFERENCE["normed_gate"].pair(CHANNELS), training=False, grad_mode=False)
    fast, plain = catalogue.ENTRIES["se"].pair(CHANNELS)
    x, norm = feature_map((2, CHANNELS, 8, 8), "nchw", torch.float32), torch.nn.BatchNorm2d(CHANNELS).eval()
    statistics = reference.batch_norm.Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    with torch.no_grad(), RecordedOps() as ops:
        assert counted(lambda: vf.functional.se(x, *fast.weights(), norm=statistics))[1] == counted(lambda: plain(x))[1]
    assert ops.names[0] == "se_normed"


@with_epilogue
def test_residual_and_activation_count_nothing(entry):
    fast, plain = entry.pair(CHANNELS)
    residual = feature_map((2, CHANNELS, 8, 8), "nchw", torch.float32, seed=2)
    assert counts(fast, residual=residual, activation="relu")[0] == counts(plain)[0]


@pytest.mark.parametrize("size", [8, 40])
def test_relative_bias_of_self_attention_counts_what_plain_attention_counts(size):
    """On the larger map the op takes several blocks."""
    options = {"channels": CHANNELS, "heads": 2, "head_dim": 8, "position_bias": (size, size)}
    found = []
    for cls in (vf.FastSelfAttention2d, reference.SelfAttention2d):
        module = cls(**options)
        x = feature_map((1, CHANNELS, size, size), "nchw", torch.float32).requires_grad_()
        y, forward = counted(lambda module=module, x=x: module(x))
        found.append((forward, counted(y.sum().backward)[1]))
    assert found[0] == found[1]


def test_every_op_has_a_formula():
    packets = {getattr(torch.ops.visattn_fast, name) for name in OPS}
    assert packets <= flop_counter.flop_registry.keys()


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "visattn_fast"])
def test_either_import_may_come_first(first):
    """Importing the package does not import the counter, and a counter made afterwards counts."""
    code = f"""
import sys
import {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "visattn_fast")
import torch
import visattn_fast as vf
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    vf.FastSE(16)(torch.randn(1, 16, 4, 4))
assert counter.get_total_flops() == 64
"""
    subprocess.run([sys.executable, "-c", code], check=True)
