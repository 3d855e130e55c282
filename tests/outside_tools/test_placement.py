"""Parameters of inner layers may be elsewhere while the layers do not run: offloaded, or sharded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import visattn_fast as vf
from changes import MATRICES
from outside import library
from twins import TWINS, images, inner_layers, training_step, twins

pytestmark = pytest.mark.filterwarnings("ignore")


def cpu_offload(model, folder):
    return library("accelerate").cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def disk_offload(model, folder):
    return library("accelerate").disk_offload(model, folder, torch.device("cpu"), offload_buffers=True)


def dispatch_model(model, folder):
    places = {"stem": "cpu", "body": "disk", "pool": "cpu", "flatten": "cpu", "head": "cpu"}
    return library("accelerate").dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, offload_buffers=True, force_hooks=True
    )


@pytest.mark.parametrize("when", ["after", "before"])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, dispatch_model], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", [name for name in TWINS if name != "nam"]
)  # NAM itself reads a weight outside its layer
def test_offloaded_layers_run(name, offload, when, tmp_path):
    """``when``: the layers are offloaded after, or before, the model is accelerated."""
    plain, fast = (model.eval() for model in twins(name))
    fast = fast if when == "after" else copy.deepcopy(plain)
    want = plain(images())
    fast = offload(fast, tmp_path)
    if when == "before":
        vf.accelerate(fast)
    with torch.no_grad():
        torch.testing.assert_close(fast(images()), want)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('gloo')}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", TWINS)
def test_sharded_layers_train(name, mesh):
    """`fully_shard` on each layer inside a gate."""
    plain, fast = twins(name)
    layers = inner_layers(fast, *MATRICES)
    if not layers:
        pytest.skip("has no layer to shard")
    for layer in layers.values():
        fully_shard(layer, mesh=mesh)
    got, want = training_step(fast, images()), training_step(plain, images())
    torch.testing.assert_close({n: getattr(t, "full_tensor", lambda t=t: t)() for n, t in got.items()}, want)
