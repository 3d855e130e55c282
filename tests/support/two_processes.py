"""The checks that test_distributed.py runs in two processes that train together.

Each process runs this file with its rank, and writes the failed checks to a JSON file. A check is a function without
arguments that raises an exception on any rank.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import visattn_fast as vf
from visattn_fast import catalogue, reference

CHECKS: dict[str, Callable[[], None]] = {}
CHANNELS = 8


def check(function):
    CHECKS[function.__name__] = function
    return function


class Gates(nn.Module):
    """The mean over one fused module of each kind.

    Modules that normalise by the batch are in eval mode, since their statistics come from one process's images.
    """

    def __init__(self, names=None, recomputed=False):
        super().__init__()
        found = {name: e for name, e in catalogue.ENTRIES.items() if f"{name}_eval" not in catalogue.ENTRIES}
        self.gates = nn.ModuleDict({name: found[name].pair(CHANNELS)[0] for name in names or found})
        self.recomputed = recomputed

    def forward(self, x):
        results = []
        for gate in self.gates.values():
            results.append(checkpoint(gate, x, use_reentrant=False) if self.recomputed else gate(x))
        return sum((x * y).mean((1, 2, 3)) for y in results) / len(results)


def images(count=4):
    return catalogue.feature_map((count, CHANNELS, 6, 5))


def mine(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def single_process(model, x):
    """Returns the gradients of one process with the whole batch."""
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def distributed_gradients(model, wrapped, x):
    wrapped(mine(x)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@check
def ddp():
    """The gradients equal those of one process, also with a static graph and with gradients as views of buckets."""
    expected = single_process(Gates(), images())
    for options in ({}, {"static_graph": True, "gradient_as_bucket_view": True}):
        model = Gates()
        found = distributed_gradients(model, DistributedDataParallel(model, **options), images())
        torch.testing.assert_close(found, expected)


@check
def ddp_channels_last():
    """No gradient has other strides than its bucket, which DDP would warn of, and copy."""
    model = Gates().to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distributed_gradients(model, DistributedDataParallel(model), images())


@check
def ddp_with_checkpoints():
    model = Gates(recomputed=True)
    found = distributed_gradients(model, DistributedDataParallel(model), images())
    torch.testing.assert_close(found, single_process(Gates(), images()))


@check
def ddp_compiled():
    """A model compiled inside DDP, and a compiled DDP, both give the gradients of one process."""
    names = ("cbam",)
    expected = single_process(Gates(names), images())
    for inside in (True, False):
        model = Gates(names)
        wrapped = DistributedDataParallel(torch.compile(model, backend="aot_eager") if inside else model)
        wrapped = wrapped if inside else torch.compile(wrapped, backend="aot_eager")
        torch.testing.assert_close(distributed_gradients(model, wrapped, images()), expected)


@check
def ddp_batch_norm():
    """In training each process normalises by its own batch, as `nn.BatchNorm2d` does; rank 0 sends its buffers."""
    entry = catalogue.ENTRIES["coord_att"]
    found = []
    for module in entry.pair(CHANNELS):
        wrapped = DistributedDataParallel(module)
        for _ in range(2):
            wrapped(mine(images())).square().mean().backward()
        found.append([*(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*found)


@check
def synchronised_batch_norm():
    """A `SyncBatchNorm` inside a fused module is called. PyTorch's own serves no CPU, and says so."""
    gate = nn.SyncBatchNorm.convert_sync_batchnorm(vf.FastCoordAtt(CHANNELS))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        gate(images())
    torch.manual_seed(0)
    model, plain = vf.FastNAM(CHANNELS), reference.NAM(CHANNELS)
    nn.init.normal_(model.bn2.weight)
    model.bn2.__class__ = SynchronisedBatchNorm
    plain.load_state_dict(model.state_dict())
    found = distributed_gradients(model, DistributedDataParallel(model), images())
    for name, expected in single_process(plain, images()).items():
        torch.testing.assert_close(found[name], expected, msg=lambda m, name=name: f"{name}: {m}")


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """A batch norm with the statistics of all processes, on any device."""

    def forward(self, x):
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        d = x - mean[:, None, None]
        var = all_reduce(d.square().sum((0, 2, 3))) / count
        scale = self.weight / torch.sqrt(var + self.eps)
        return d * scale[:, None, None] + self.bias[:, None, None]


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for gate in model.gates.values():
        if list(gate.parameters()):
            fully_shard(gate, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@check
def fsdp():
    """Two AdamW steps with sharded parameters equal those of one process; the gathered state_dict is complete."""
    model, plain = sharded(Gates()), Gates()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    single = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for _ in range(2):
        found = distributed_gradients(model, model, images())
        expected = single_process(plain, images())
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient.full_tensor(), expected[name], msg=lambda m, name=name: f"{name}: {m}")
        optimizer.step()
        single.step()
        optimizer.zero_grad()
        single.zero_grad()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(whole, plain.state_dict(), rtol=1e-4, atol=1e-5)


@check
def fsdp_mixed_precision():
    """Parameters and maps are bfloat16; gradients and their sums are float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    names = ("se", "cbam", "coord_att_eval")
    model, plain = sharded(Gates(names), mp_policy=policy), Gates(names)
    found, expected = distributed_gradients(model, model, images()), single_process(plain, images())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.full_tensor(), expected[name], rtol=0.1, atol=0.01)


@check
def fsdp_from_meta():
    """A model on the meta device is sharded, allocated and loaded, and gives the results of its source."""
    source = Gates(("cbam", "coord_att_eval"))
    with torch.device("meta"):
        model = copy.deepcopy(source).to("meta")
    sharded(model).to_empty(device="cpu")
    set_model_state_dict(model, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(model(images()), source(images()))


def main(store: str, rank: int, world: int, report: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    failed = {}
    for name, function in CHECKS.items():
        try:
            function()
        except Exception:
            failed[name] = traceback.format_exc()
    Path(report).write_text(json.dumps(failed))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
