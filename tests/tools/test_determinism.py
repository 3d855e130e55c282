"""`tools.determinism`: a few of its repeats over the whole catalogue, and modules that it must report."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import visattn_fast as vf
from cases import TARGETS, entries
from tools import determinism
from visattn_fast import catalogue


@pytest.mark.skipif(("cpu", "cpp") not in TARGETS, reason="needs the native library")
@entries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_give_the_same_bits(entry, dtype):
    x = catalogue.feature_map(determinism.SHAPE, "channels_last", dtype)
    with vf.use_backend("cpp"):
        found = determinism.differences(entry.pair(x.shape[1], dtype)[0], x, repeats=2)
    assert not determinism.faults(entry, found), found


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class DependentOnThreads(nn.Module):
    def forward(self, x):
        return x * torch.get_num_threads()


class Refused(nn.Module):
    def forward(self, x):
        raise RuntimeError("f does not have a deterministic implementation")


def test_differences_are_counted():
    x, eca = torch.ones(1, 2, 3, 4), catalogue.ENTRIES["eca"]
    found = {module: determinism.differences(module(), x, 5) for module in (Random, DependentOnThreads, Refused)}
    assert found[Random] == (20, 20, False)
    assert found[DependentOnThreads] == (0, 15, False)
    assert str(found[Refused]) == "raises"
    assert all(determinism.faults(eca, differences) for differences in found.values())
    assert not determinism.faults(catalogue.ENTRIES["bam"], found[DependentOnThreads])
