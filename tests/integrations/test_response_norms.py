"""Global response normalization as timm, transformers and MONAI spell it."""

from __future__ import annotations

import copy

import pytest
import torch

import visattn_fast as vf
from outside import library
from visattn_fast import reference

pytestmark = pytest.mark.filterwarnings("ignore")


def convnext_of_timm():
    return library("timm").create_model("convnextv2_atto", num_classes=3)


def convnext_of_transformers():
    transformers = library("transformers")
    return transformers.ConvNextV2Model(
        transformers.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    )


def mednext(dimensions, norm=True):
    return library("monai.networks.nets.mednext").MedNeXt(
        spatial_dims=dimensions, init_filters=4, in_channels=3, out_channels=2, global_resp_norm=norm
    )


# Name -> the network, the modules of it that are swapped, and the dimensions of its images.
NETWORKS = {
    "timm convnextv2": (convnext_of_timm, 12, 2),
    "transformers ConvNextV2": (convnext_of_transformers, 4, 2),
    "monai MedNeXt 2-D": (lambda: mednext(2), 22, 2),
    "monai MedNeXt 3-D": (lambda: mednext(3), 22, 3),
}


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_match(name):
    """Values and gradients agree. The weights of the norms start as zeros, so they are moved."""
    make, count, dimensions = NETWORKS[name]
    torch.manual_seed(0)
    plain = make().double().train()
    for key, parameter in plain.named_parameters():
        if "grn" in key or "global_resp" in key:
            parameter.data += 0.5 * torch.rand_like(parameter)
    fast = copy.deepcopy(plain)
    report = vf.accelerate(fast)
    assert [s.recipe.op for s in report.swapped] == ["grn"] * count
    assert not report.skipped
    x = torch.randn(1, 3, *(32,) * dimensions, dtype=torch.float64)
    found = []
    for model in (fast, plain):
        y = output(model, x)
        grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
        found.append([y, *torch.autograd.grad(y, list(model.parameters()), grad, allow_unused=True)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_blocks_without_the_norm_are_not_mentioned():
    report = vf.accelerate(mednext(3, norm=False))
    assert not report.swapped
    assert not report.skipped


@pytest.mark.parametrize("last", [True, False], ids=["grid", "map"])
@pytest.mark.parametrize("fused", [True, False], ids=["accelerated", "plain"])
def test_layer_of_timm_in_both_layouts(last, fused):
    norm = library("timm.layers.grn").GlobalResponseNorm(8, channels_last=last).double()
    torch.nn.init.normal_(norm.weight)
    ours = reference.GRN(8).double()
    ours.load_state_dict(norm.state_dict())
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    given = x.permute(0, 2, 3, 1) if last else x
    want = norm(given)
    if fused:
        assert vf.accelerate(norm).swapped
    torch.testing.assert_close(norm(given), want)
    torch.testing.assert_close(vf.attention_maps(norm, given)["channel"], ours.attention(x)["channel"])
