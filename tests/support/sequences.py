"""Attention layers over sequences, reference and fast, with their inputs, masks and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

import visattn_fast as vf
from visattn_fast import reference

N, Q, K, D = 3, 5, 7, 6  # sequences, queries, keys, features
LENGTHS = torch.tensor([7, 4, 0])
SCORES = reference.sequence.SCORES
VARIANTS = {
    "layer": ("layer", {}),
    "pooling": ("pooling", {}),
    **{s: ("sequence", {"score": s}) for s in SCORES},
    **{f"{s}-window": ("sequence", {"score": s, "window": 2}) for s in SCORES},
    **{f"{s}-predictive": ("sequence", {"score": s, "window": 2, "predictive": True}) for s in SCORES},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
weighted = pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])


def build(name, **options):
    """Builds a reference module and the fast one with the same parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = {
            "layer": lambda: reference.AttentionLayer(D, 5, 8),
            "pooling": lambda: reference.AttentionPooling(),
            "sequence": lambda: reference.SequenceAttention(query_size=D, hidden_size=9, **options),
        }[name]()
    fast = copy.deepcopy(plain)
    fast.__class__ = getattr(vf, f"Fast{type(plain).__name__}")
    return plain, fast


def build_variant(variant):
    """Builds the two modules of one of `VARIANTS`."""
    name, options = VARIANTS[variant]
    return build(name, **options)


def inputs(variant, dtype=torch.float32, scale=1.0):
    """Returns queries, keys and values of a variant, ``[N, L, D]``, or ``[N, L]`` for pooling."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((N, Q), (N, K), (N, K)) if variant == "pooling" else ((N, Q, D), (N, K, D), (N, K, D))
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in sizes]


def padding(lengths=LENGTHS, size=K):
    """Returns a mask ``[N, 1, K]`` of the keys before each length."""
    return (torch.arange(size) < lengths[:, None])[:, None]


def gradients(module, tensors, **kw):
    """Returns the output, the attention weights, and the gradients of tensors and parameters."""
    module = copy.deepcopy(module)
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, weights = module(*tensors, **kw)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    wanted = [*tensors, *module.parameters()]
    return [out.detach(), weights, *torch.autograd.grad(out, wanted, grad, allow_unused=True)]
