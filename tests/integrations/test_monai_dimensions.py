"""MONAI's squeeze-and-excitation in one, two and three dimensions, and a whole SENet of volumes."""

from __future__ import annotations

import copy

import pytest
import torch

import visattn_fast as vf
from outside import library
from visattn_fast.catalogue import feature_map

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = (5, 6, 7)
dimensions = pytest.mark.parametrize("dimensions", [1, 2, 3])


def run(module, x):
    """Returns the result and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def twins(name, *arguments):
    torch.manual_seed(0)
    plain = getattr(library("monai.networks.blocks"), name)(*arguments).double()
    fast = copy.deepcopy(plain)
    report = vf.accelerate(fast)
    assert report.swapped
    assert not report.skipped
    return plain, fast


@dimensions
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", ["ChannelSELayer", "ResidualSELayer"])
def test_layers_match(name, dimensions, last):
    plain, fast = twins(name, dimensions, 8)
    x = feature_map((2, 8, 5, 42), dtype=torch.float64).reshape(2, 8, -1)[..., : 7 * 6 * 5]
    x = x.unflatten(2, SIZES)[(...,) + (0,) * (3 - dimensions)]
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()
    torch.testing.assert_close(run(fast, x), run(plain, x))


@dimensions
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["SEResNetBottleneck", "SEResNeXtBottleneck", "SEBottleneck"])
def test_blocks_match(name, dimensions, training):
    options = {"SEBottleneck": (4, 2), "SEResNetBottleneck": (1, 2), "SEResNeXtBottleneck": (2, 2, 1, None, 8)}[name]
    plain, fast = twins(name, dimensions, 32, 8, *options)
    x = torch.randn(2, 32, *SIZES[:dimensions], dtype=torch.float64)
    plain.train(training)
    fast.train(training)
    torch.testing.assert_close(run(fast, x), run(plain, x))
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@dimensions
def test_an_input_of_other_dimensions_is_left_to_the_library(dimensions):
    """PyTorch's pooling takes the batch for channels if it is missing; the error is the library's."""
    plain, fast = twins("ChannelSELayer", dimensions, 8)
    x = torch.randn(8, *SIZES[:dimensions], dtype=torch.float64)
    errors = []
    for module in (plain, fast):
        with pytest.raises((RuntimeError, IndexError)) as error:
            module(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_senet_of_volumes_is_accelerated_whole():
    torch.manual_seed(0)
    plain = library("monai.networks.nets").SEResNet50(spatial_dims=3, in_channels=1, num_classes=2).double().eval()
    fast = copy.deepcopy(plain)
    report = vf.accelerate(fast)
    assert len(report.swapped) == 32  # 16 gates, and the blocks around them
    assert not report.skipped
    x = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x))
