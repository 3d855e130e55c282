"""Torch-Pruning finds the layers inside gates, and prunes them with the layers around."""

from __future__ import annotations

import pytest
import torch

from outside import library
from twins import images, twins

pytestmark = pytest.mark.filterwarnings("ignore")

# The plain networks that Torch-Pruning prunes. It does not follow channels through ECA's convolution along them, through
# the maps [mean, maximum] of spatial gates, and through shuffled channels.
PRUNED = ("se", "coord_att", "gam", "nam", "soca")
PRUNED += ("timm_se", "timm_coord", "timm_swin", "torchvision_se", "monai_se")


def pruned(model):
    """Takes two channels from the stem. Returns the shapes that this leaves, and the output."""
    tp = library("torch_pruning")
    graph = tp.DependencyGraph().build_dependency(model.eval(), images())
    graph.get_pruning_group(model.stem, tp.prune_conv_out_channels, idxs=[1, 6]).prune()
    return {name: p.shape for name, p in model.named_parameters()}, model(images())


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_channels_reach_the_layers_inside(name):
    plain, fast = twins(name)
    before = sum(p.numel() for p in plain.body.parameters())
    (shapes, want), (fast_shapes, got) = pruned(plain), pruned(fast)
    assert fast_shapes == shapes
    assert sum(p.numel() for p in plain.body.parameters()) < before
    torch.testing.assert_close(got, want)
