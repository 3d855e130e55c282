"""SK: running statistics, empty batches, and the kernels over its branches in both layouts."""

from __future__ import annotations

import importlib

import pytest
import torch

import visattn_fast as vf
from cases import feature_map, layouts
from visattn_fast import catalogue, reference


def arguments(shape, layout, dtype=torch.float32):
    """Returns branches and weights of `functional.sk` with d = 6."""
    branches = [feature_map(shape, layout, dtype, seed=seed) for seed in (0, 1)]
    c, generator = shape[1], torch.Generator().manual_seed(0)
    sizes = ((6, c), (6,), (6,), (6,), (6,), (c, 6), (c,), (c, 6), (c,))
    weights = [torch.rand(size, generator=generator).to(dtype) for size in sizes]
    return branches + weights


@layouts
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_running_statistics_move_as_those_of_a_batch_norm(layout, backend):
    """Running statistics may have another dtype than x."""
    tensors = arguments((3, 8, 4, 5), layout, torch.float64)
    for i in (5, 6):
        tensors[i] = tensors[i].float()
    center, var = tensors[5].clone(), tensors[6].clone()
    z = (tensors[0].relu() + tensors[1].relu()).mean((2, 3)) @ tensors[2].t()
    with vf.use_backend(backend):
        vf.functional.sk(*tensors, training=True, momentum=0.25)
    torch.testing.assert_close(tensors[5], 0.75 * center + 0.25 * z.mean(0).float())
    torch.testing.assert_close(tensors[6], 0.75 * var + 0.25 * z.var(0).float())


@pytest.mark.parametrize("functions", [vf.functional, reference], ids=["fast", "reference"])
def test_single_image_in_training_raises(functions):
    with pytest.raises(ValueError, match=r"at least 2 images in training, got 1"):
        functions.sk(*arguments((1, 8, 4, 5), "nchw"), training=True)


def test_empty_batch_launches_nothing(monkeypatch):
    pytest.importorskip("triton")
    branches = importlib.import_module("visattn_fast.kernels.ops.branches")
    kernels = importlib.import_module("visattn_fast.kernels.passes.branches")

    def no_launch(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(type(kernels._branch_sums_kernel), "__getitem__", no_launch)
    v, gate, dmean = (torch.ones(s) for s in ((0, 6, 3, 3), (0, 2, 6), (0, 6)))
    assert branches.branch_mean(v, v).shape == dmean.shape
    assert branches.branch_sum(v, v, gate).shape == v.shape
    assert branches.branch_dot(v, v, v).shape == gate.shape
    assert all(d.shape == v.shape for d in branches.branch_grad(v, v, v, gate, dmean))


@layouts
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("shape", [(64, 256, 56, 56), (4096, 256, 56, 56)], ids=["plain", "huge"])
def test_branch_kernels_compile_without_faults(layout, target, shape):
    """`tools.compiled` sees one layout alone, since the convolutions before the branches drop that of meta tensors."""
    pytest.importorskip("triton")
    compiled = pytest.importorskip("tools.compiled", reason="not beside the repository's tools")
    launches = importlib.import_module("tools.launches")
    uses = []

    def see(launch, run):
        uses.append(compiled.Use(launch, "sk", shape))

    v1, v2 = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=catalogue.LAYOUTS[layout])
        for _ in range(2)
    )
    sizes = ((32, 256), (32,), (32,), (32,), (32,), (256, 32), (256,), (256, 32), (256,))
    weights = [torch.empty(size, device="meta") for size in sizes]
    with launches.routed("sk", see):
        y = vf.functional.sk(v1.requires_grad_(), v2.requires_grad_(), *weights)
        torch.autograd.grad(y, [v1, v2], torch.empty_like(y))
    found = compiled.compile_all(compiled.specialise(uses, [target]))
    assert len(found) >= 4
    seen = {c.variant.uses[0].launch.constants.get("TILE.CHANNELS_LAST") for c in found} - {None}
    assert seen == {layout == "channels_last"}
    assert not [fault for c in found for fault in c.faults]


@layouts
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_branches_of_two_dtypes_are_widened(layout, dtypes, training):
    """The result has v1's dtype, and both branches' gradients their own; running statistics are updated once."""
    tensors = arguments((3, 8, 4, 5), layout)
    found = []
    for function, wide in ((vf.functional.sk, False), (reference.sk, True)):
        given = [t.clone() for t in tensors]
        given[:2] = [t.to(d).requires_grad_() for t, d in zip(given[:2], dtypes, strict=True)]
        branches = [t.double() for t in given[:2]] if wide else given[:2]
        rest = [t.double() for t in given[2:]] if wide else given[2:]
        y = function(*branches, *rest, training=training, momentum=0.25)
        grads = torch.autograd.grad(y.square().sum(), given[:2])
        assert [g.dtype for g in grads] == list(dtypes)
        assert wide or y.dtype == dtypes[0]
        found.append([t.detach().double() for t in (y, *grads, rest[3], rest[4])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * want.abs().max().item())
