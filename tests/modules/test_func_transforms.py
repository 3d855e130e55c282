"""torch.func over the fused modules: grad, vmap, jvp, hessian."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import visattn_fast as vf
from cases import INTERPRETED, entries, feature_map, targets
from visattn_fast import catalogue


def normalises_by_batch(entry):
    """True if running statistics are updated in place, which torch.func refuses for PyTorch's own batch norm too."""
    return entry.training and any(b.dtype.is_floating_point for b in entry.pair(8)[0].buffers())


stateless = pytest.mark.parametrize(
    "entry", [e for e in catalogue.ENTRIES.values() if not normalises_by_batch(e)], ids=lambda e: e.name
)


def detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.interpreted
@entries
def test_grad_matches_autograd(entry):
    """torch.func.grad gives the gradients of autograd, by the kernels if they are chosen explicitly.

    Running statistics are arguments too, since the module writes to them.
    """
    fast, _ = entry.pair(8)
    if (entry.has_torch_layers or entry.partial_gradients) and normalises_by_batch(entry):
        pytest.skip("PyTorch's batch norm updates its statistics in place, which torch.func refuses")
    x = feature_map((2, 8, 4, 4), "nchw", torch.float32)
    parameters = dict(fast.named_parameters())
    buffers = {name: b.clone() for name, b in fast.named_buffers()}

    def loss(x, parameters, buffers):
        return functional_call(fast, (parameters, buffers), (x,)).square().sum()

    with vf.use_backend("triton" if INTERPRETED else "cpp"):
        dx, dparameters = grad(loss, argnums=(0, 1))(x, parameters, buffers)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(fast(leaf).square().sum(), [leaf, *parameters.values()])
    torch.testing.assert_close((dx, *dparameters.values()), expected, rtol=1e-4, atol=1e-5)


@stateless
def test_vmap_matches_a_batch_and_reference(entry):
    """vmap maps over images, and over the gradients of each image's loss, which are per-sample gradients."""
    x = feature_map((3, 8, 5, 4), "nchw", torch.float32)
    found = []
    for module in entry.pair(8):
        parameters = detached(module)

        def one(parameters, image, module=module):
            return functional_call(module, parameters, (image[None],))[0]

        def loss(parameters, image, one=one):
            return one(parameters, image).square().sum()

        found.append(vmap(one, (None, 0))(parameters, x))
        found.append(vmap(grad(loss), (None, 0))(parameters, x))
    torch.testing.assert_close(found[0], module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:2], found[2:])


@stateless
def test_forward_mode_matches_reference(entry):
    """jvp and dual numbers give the derivative along a direction, with parameters that require a gradient too."""
    fast, plain = entry.pair(8)
    x, along = (feature_map((2, 8, 5, 4), "nchw", torch.float32, seed=seed) for seed in (0, 1))
    expected = jvp(plain, (x,), (along,))
    torch.testing.assert_close(jvp(fast, (x,), (along,)), expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(fast(forward_ad.make_dual(x, along)))), expected)


@pytest.mark.parametrize("name", ["cbam", "coord_att_eval", "self_attention"])
def test_hessian_matches_reference(name):
    fast, plain = catalogue.ENTRIES[name].pair(8)
    x = feature_map((1, 8, 2, 2), "nchw", torch.float32)
    found = [hessian(lambda x, m=m: m(x).square().sum())(x) for m in (fast, plain)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@targets
def test_explicit_backend_serves_grad_and_refuses_vmap(device, backend):
    fast = vf.FastSE(16).to(device)
    x = feature_map((2, 16, 5, 4), "nchw", torch.float32, device)
    expected = grad(lambda x: fast(x).square().sum())(x)
    with vf.use_backend(backend):
        torch.testing.assert_close(grad(lambda x: fast(x).square().sum())(x), expected)
        with pytest.raises(RuntimeError, match="vmap"):
            vmap(lambda image: fast(image[None]))(x)


def test_compiled_vmap_matches_reference():
    fast, plain = catalogue.ENTRIES["se"].pair(16)
    x = feature_map((3, 16, 5, 4), "nchw", torch.float32)
    compiled = torch.compile(vmap(lambda image: fast(image[None])[0]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="eager")(x), plain(x))
