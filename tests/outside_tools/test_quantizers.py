"""torchao and torch.ao quantize the layers inside gates as they quantize plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visattn_fast as vf
from changes import MATRICES
from outside import library
from twins import TWINS, images, inner_layers, training_step, twins

pytestmark = pytest.mark.filterwarnings("ignore")
WITH_LINEAR = ("se", "bam", "gam", "window_attention", "split_attention", "self_attention", "timm_swin")
X = images(torch.float32)


def is_inner_linear(module, name):
    return isinstance(module, nn.Linear) and name.startswith("body.")


def pair(name, when):
    plain, fast = twins(name, torch.float32)
    return plain, fast if when == "after" else copy.deepcopy(plain)


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("name", WITH_LINEAR)
def test_quantized_weights_count(name, config, when):
    """``when``: the layers are quantized after, or before, the model is accelerated."""
    torchao = library("torchao.quantization")
    plain, fast = pair(name, when)
    for model in (plain.eval(), fast.eval()):
        torchao.quantize_(model, getattr(torchao, config)(), filter_fn=is_inner_linear)
    assert all(type(layer.weight) is torchao.Int8Tensor for layer in inner_layers(fast, nn.Linear).values())
    if when == "before":
        vf.accelerate(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X))


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("name", WITH_LINEAR)
def test_fake_quantized_layers_train_and_convert(name, when):
    """torchao's quantization-aware training of 8-bit weights and activations."""
    torchao, qat = library("torchao.quantization"), library("torchao.quantization.qat")
    base = torchao.Int8DynamicActivationIntxWeightConfig(torch.int8, torchao.PerAxis(0))
    plain, fast = pair(name, when)
    for model in (plain, fast):
        torchao.quantize_(model, qat.QATConfig(base, step="prepare"), filter_fn=is_inner_linear)
    assert inner_layers(fast, qat.FakeQuantizedLinear)
    if when == "before":
        vf.accelerate(fast)
    torch.testing.assert_close(training_step(fast, X), training_step(plain, X), rtol=1e-4, atol=1e-4)
    for model in (plain, fast):
        model.eval()
        torchao.quantize_(model, qat.QATConfig(base, step="convert"), filter_fn=is_inner_linear)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), plain(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("name", TWINS)
def test_swapped_layers_of_torch_ao_train(name, when):
    """`torch.ao.quantization.prepare_qat` replaces layers, and observes the outputs of others by hooks."""
    ao = torch.ao.quantization
    plain, fast = pair(name, when)
    if not inner_layers(plain, *MATRICES):
        pytest.skip("has no layer to quantize")
    for model in (plain, fast):
        model.train()
        model.body.qconfig = ao.get_default_qat_qconfig("x86")
        ao.prepare_qat(model, inplace=True)
    if when == "before":
        vf.accelerate(fast)
    torch.testing.assert_close(training_step(fast, X), training_step(plain, X), rtol=1e-4, atol=1e-4)
