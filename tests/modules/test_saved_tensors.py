"""Hooks on saved tensors: what they bring back is used as it is, or refused; it is never misread."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from cases import entries, feature_map
from visattn_fast import catalogue


def halved(t):
    return t.half() if t.is_floating_point() and t.dim() else t


def all_halved(t):
    return (t.half() if t.dim() else t), t.dtype


def spread(t):
    """Equal values, with gaps between them."""
    wider = torch.empty([*t.shape, 2], dtype=t.dtype)
    return wider[..., 1].copy_(t)


def turned(t):
    """Equal values, with the dimensions in the opposite order in memory."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def other_layout(t):
    """Equal values, a map of channels_last in NCHW and the other way round."""
    if t.dim() != 4:
        return t
    last = t.is_contiguous(memory_format=torch.channels_last)
    return t.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def gradients(module, pack, unpack):
    module.zero_grad()
    x = feature_map((2, 32, 6, 5), "nchw", torch.float32).requires_grad_()
    with saved_tensors_hooks(pack, unpack):
        y = module(x)
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def twin(entry):
    torch.manual_seed(0)
    return entry.pair(32)[0].eval()


def worst(found, wanted):
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in zip(found, wanted, strict=True))


@entries
@pytest.mark.parametrize("unpack", [spread, turned, other_layout])
def test_other_strides_change_nothing(entry, unpack):
    module = twin(entry)
    wanted = gradients(module, lambda t: t, lambda t: t)
    assert worst(gradients(module, lambda t: t, unpack), wanted) < 1e-5


@entries
def test_compressed_activations(entry):
    """Packed to half precision and unpacked to their dtype, the saved tensors give gradients of that precision."""
    module = twin(entry)
    wanted = gradients(module, lambda t: t, lambda t: t)
    found = gradients(module, all_halved, lambda packed: packed[0].to(packed[1]))
    assert worst(found, wanted) < 0.05


@entries
def test_another_dtype_is_refused_or_right(entry):
    """Unpacked in half precision, they are refused, or the gradients are right: PyTorch's own layers do the same."""
    module = twin(entry)
    wanted = gradients(module, lambda t: t, lambda t: t)
    try:
        found = gradients(module, halved, lambda t: t)
    except RuntimeError:
        return
    assert worst(found, wanted) < 0.05


def test_another_shape_is_refused():
    module = twin(catalogue.ENTRIES["se"])
    with pytest.raises(RuntimeError, match="se_bwd: w2 must have the shape"):
        gradients(module, lambda t: t, lambda t: t[:1] if t.dim() == 2 and t.shape[0] == 2 else t)
