"""Attention over sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..backends import reference_asked

_SMALL = 1 << 16  # weights; below, PyTorch's fused attention takes longer on a CPU than its products, forward and back


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T) v`` without its map of weights, by `torch.nn.functional.scaled_dot_product_attention`.

    Training on a CPU with few weights is left to matrix products.

    Args:
        q: ``[N, Q, d]``.
        k: ``[N, K, d]``.
        v: ``[N, K, e]``.
        mask: bool, two or three dimensions, broadcastable to ``[N, Q, K]``; True: attends. A row without any is zeros.

    Returns:
        ``[N, Q, e]``. Its double backward is PyTorch's: not every device has one.
    """
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training and q.device.type == "cpu" and q.shape[0] * q.shape[1] * k.shape[1] <= _SMALL:
        weights = reference.masked_softmax((q * scale) @ k.transpose(1, 2), mask)
        return weights.to(v.dtype) @ v
    size = v.shape[2]
    width = max(q.shape[2], size)  # the kernels that make no map want one size
    q, k, v = (F.pad(t, (0, width - t.shape[2]))[:, None] if t.shape[2] < width else t[:, None] for t in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0, :, :size]
    seeing = mask.any(-1, keepdim=True)
    kept = mask | ~seeing  # a softmax of nothing is left to no kernel
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None] if kept.dim() == 3 else kept, scale=scale)
    return out[:, 0, :, :size].masked_fill(~seeing, 0.0)


def additive_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``v^T tanh(q_i + k_j)``: ``[N, Q, h]``, ``[N, K, h]`` and ``[h]`` -> ``[N, Q, K]``, in blocks.

    The hidden layer ``[N, Q, K, h]`` is neither stored nor kept for the backward pass, which computes it again, unless
    it is one block anyway.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", ICLR 2015.
    """
    if reference_asked() or ops.fits_a_block(q, k):
        return ops.mixed(reference.additive_score, q, k, v)
    return ops.run(ops.AdditiveScoreFunction, q, k, v)[0]
