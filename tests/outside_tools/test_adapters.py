"""peft's adapters on the layers inside gates train and merge as on plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import RecordedOps
from changes import MATRICES
from outside import library
from twins import TWINS, images, inner_layers, training_step, twins

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(peft, names, **options):
    return peft.LoraConfig(r=2, target_modules=names, **options)


def ia3(peft, names):
    return peft.IA3Config(target_modules=names, feedforward_modules=names[:1])


def is_dense(layer):
    """True if peft can stand for the layer.

    It forgets groups, dilation and padding mode of a convolution: findings/peft_padding_mode.sh.
    """
    return isinstance(layer, nn.Linear) or (layer.groups, {*layer.dilation}, layer.padding_mode) == (1, {1}, "zeros")


def is_pointwise(layer):
    return layer.kernel_size == (1, 1) and layer.groups == 1


# The layers that an adapter takes, and its configuration. OFT forgets padding, and takes a Linear's tokens for maps:
# findings/peft_oft_takes_tokens_for_maps.sh.
ADAPTERS = {
    "lora": (MATRICES, is_dense, lora),
    "dora": (MATRICES, is_dense, lambda peft, names: lora(peft, names, use_dora=True)),
    "ia3": ((nn.Linear, nn.Conv2d), is_dense, ia3),
    "lokr": ((nn.Linear, nn.Conv2d), is_dense, lambda peft, names: peft.LoKrConfig(r=2, target_modules=names)),
    "oft": ((nn.Conv2d,), is_pointwise, lambda peft, names: peft.OFTConfig(oft_block_size=2, target_modules=names)),
}


def adapted(model, names, adapter):
    """Wraps the layers of these names, with adapters that change the output."""
    peft = library("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, ADAPTERS[adapter][2](peft, names))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", TWINS)
def test_adapters_inside_train_and_merge(name, adapter, when):
    """``when``: peft wraps the layers after, or before, the model is accelerated. Merged layers are fused again."""
    plain, fast = twins(name)
    fast = fast if when == "after" else copy.deepcopy(plain)
    kinds, takes, _ = ADAPTERS[adapter]
    names = [n for n, layer in inner_layers(plain, *kinds).items() if takes(layer)]
    if not names:
        pytest.skip("has no layer for this adapter")
    plain, fast = adapted(plain, names, adapter), adapted(fast, names, adapter)
    if when == "before":
        vf.accelerate(fast)
    torch.testing.assert_close(training_step(fast, images()), training_step(plain, images()))
    with torch.no_grad():
        want = plain.eval()(images())
        merged = fast.eval().merge_and_unload()
        vf.accelerate(merged)
        with RecordedOps() as recorded:
            torch.testing.assert_close(merged(images()), want)
    assert recorded.calls
