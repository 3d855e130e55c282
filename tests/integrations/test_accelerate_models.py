"""Whole models of other libraries, accelerated: training gives the same numbers, and restore gives the model back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

import visattn_fast as vf
from outside import library, timm_model
from visattn_fast.catalogue import feature_map
from visattn_fast.models import AttentionResNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Model(NamedTuple):
    """A model with random weights, and how many of its modules and blocks are swapped."""

    build: Callable[[], nn.Module]
    gates: int
    blocks: int


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(library("torchvision.models"), name)(num_classes=10)


def unet() -> nn.Module:
    build = library("segmentation_models_pytorch").Unet
    return build("resnet18", encoder_weights=None, decoder_attention_type="scse")


def timm_swin() -> nn.Module:
    """Builds a Swin transformer on maps of 16 x 16 and 8 x 8 tokens, which are no multiples of the window."""
    build = library("timm.models.swin_transformer").SwinTransformer
    return build(64, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=7, num_classes=10)


def torchvision_swin() -> nn.Module:
    build = library("torchvision.models.swin_transformer").SwinTransformer
    return build([4, 4], 16, [2, 2], [1, 2], [7, 7], num_classes=10)


def monai_senet() -> nn.Module:
    build = library("monai.networks.nets").SENet
    options = {"dropout_prob": None, "inplanes": 64, "downsample_kernel_size": 1, "input_3x3": False}
    return build(2, 3, "se_resnet_bottleneck", (1, 1, 1, 1), groups=1, reduction=16, num_classes=10, **options)


MODELS = {
    "timm seresnet50": Model(timm_model("seresnet50"), 16, 16),
    "timm ecaresnet50d": Model(timm_model("ecaresnet50d"), 16, 16),
    "timm efficientnet_b0": Model(timm_model("efficientnet_b0"), 16, 0),
    "timm mobilenetv3_large_100": Model(timm_model("mobilenetv3_large_100"), 8, 0),
    "torchvision efficientnet_b0": Model(torchvision_model("efficientnet_b0"), 16, 0),
    "torchvision mobilenet_v3_small": Model(torchvision_model("mobilenet_v3_small"), 9, 0),
    "timm Swin": Model(timm_swin, 4, 0),
    "torchvision Swin": Model(torchvision_swin, 4, 0),
    "smp Unet": Model(unet, 10, 0),
    "timm resnet10t with CBAM": Model(timm_model("resnet10t", block_args={"attn_layer": "cbam"}), 4, 4),
    "monai SENet": Model(monai_senet, 4, 4),
    "own ResNet": Model(lambda: AttentionResNet("cbam", fused=False), 3, 3),
}


def built(name: str) -> nn.Module:
    """Builds the model in float64: batch norms magnify the rounding of float32."""
    torch.manual_seed(0)
    model = MODELS[name].build().double()
    for module in model.modules():  # branches whose last norm begins at zero would hide their gates
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.constant_(module.weight, 0.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(model: nn.Module, x: torch.Tensor, steps: int = 1) -> dict[str, torch.Tensor]:
    """Trains by SGD. Returns parameters and buffers, and the output and gradients of the first step."""
    optimizer, first = torch.optim.SGD(model.parameters(), 1e-4), {}  # larger steps magnify any rounding
    for _ in range(steps):
        torch.manual_seed(1)  # for drop path
        y = model(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        first = first or {"y": y.detach()} | {
            f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        optimizer.step()
    return first | {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_accelerated_model_trains_alike(name):
    """Three steps give the same gradients, parameters and statistics; eval and restore give the same output."""
    model, x = built(name), feature_map((2, 3, 64, 64), dtype=torch.float64)
    plain, state = copy.deepcopy(model), {k: t.clone() for k, t in model.state_dict().items()}
    hooked: list[str] = []
    parameters = dict(model.named_parameters())
    found = vf.accelerate(model)
    gates = [s for s in found.swapped if not s.recipe.block]
    assert (len(gates), len(found.swapped) - len(gates)) == MODELS[name][1:], str(found)
    gates[0].module.register_forward_hook(lambda *_: hooked.append("ran"))
    assert all(p is parameters[k] for k, p in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    want, got = step(plain, x, 3), step(model, x, 3)
    assert hooked
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        # PyTorch's gradient of a hard sigmoid takes 1/6 in float32, even in float64.
        allowed = 1e-6 * tensor.abs().max().item() + 1e-8
        torch.testing.assert_close(got[key], tensor, rtol=1e-6, atol=allowed, msg=f"{name}: {key}")
    with torch.no_grad():
        model.load_state_dict(plain.state_dict())
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-8, atol=1e-8)
        assert vf.restore(model) == len(found.swapped)
        assert torch.equal(model(x), plain(x))
    assert not any("_qualified_name" in m.__dict__ for m in model.modules())


def test_swin_tiny_trains_alike():
    """The published size: one step of training, then restore."""
    torch.manual_seed(0)
    model, x = timm_model("swin_tiny_patch4_window7_224")(), feature_map((1, 3, 224, 224))
    plain = copy.deepcopy(model)
    assert len(vf.accelerate(model).swapped) == 12
    want, got = step(plain, x), step(model, x)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        allowed = 1e-4 * tensor.abs().max().item()
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=allowed, msg=f"Swin-T: {key}")
    assert vf.restore(model) == 12
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))
