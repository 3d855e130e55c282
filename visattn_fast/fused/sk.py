"""Selective kernels: fused selection between two branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops.autograd import mixed
from ..ops.sk import SK
from ..reference.as_built import as_built
from ..reference.batch_norm import update_running_statistics
from ..reference.checks import check_branches
from .serve import serve

__all__ = ["FastSK", "sk"]


def sk(
    v1: Tensor,
    v2: Tensor,
    w: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Weighs two branches: ``gate_1 relu(v1) + gate_2 relu(v2)``; in each channel the gates sum to one.

    ``h = relu(batch_norm(w mean(relu(v1) + relu(v2))))``, the mean over H and W; ``gate = softmax([w1 h + b1, w2 h +
    b2])`` over the two branches. The branches' ReLUs and their sum are never stored.

    Args:
        v1, v2: the branches before their ReLU, ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        w: ``[d, C]`` (or, as a 1x1 convolution, ``[d, C, 1, 1]``).
        norm_weight, norm_bias, running_mean, running_var: parameters and statistics of the batch norm, ``[d]``. Without
            running statistics the batch's are used.
        w1, b1, w2, b2: weight ``[C, d]`` (or ``[C, d, 1, 1]``) and bias ``[C]``.
        training: normalise with the batch's statistics and update the running ones in place.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        ``[N, C, H, W]`` in v1's dtype and memory format. Sums are kept in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, a batch of fewer than two images in training.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Li et al., "Selective Kernel Networks", CVPR 2019.
    """
    norm = norm_weight, norm_bias
    check_branches(v1, v2, w, *norm, running_mean, running_var, w1, b1, w2, b2, training=training)
    if v1.dtype != v2.dtype:
        wide = torch.promote_types(v1.dtype, v2.dtype)
        weights = w, *norm, running_mean, running_var, w1, b1, w2, b2
        return sk(v1.to(wide), v2.to(wide), *weights, training=training, momentum=momentum, eps=eps).to(v1.dtype)

    def plain() -> Tensor:
        # The running statistics are updated in place: `mixed` must not replace them by copies in another dtype.
        def mathematics(*tensors: Any) -> Tensor:
            weights = *tensors[:5], running_mean, running_var, *tensors[5:]
            return reference.sk(*weights, training=training, momentum=momentum, eps=eps)

        return mixed(mathematics, v1, v2, w, *norm, w1, b1, w2, b2)

    batch = training or running_mean is None or running_var is None
    statistics = (None, None) if batch else (running_mean, running_var)

    def update(small: Sequence[Tensor]) -> None:
        var, center = torch.var_mean(small[1], 0, correction=0)
        update_running_statistics(running_mean, running_var, center, var, v1.shape[0], momentum)

    tensors = (v1, v2, w, *norm, *statistics, w1, b1, w2, b2)
    return serve(SK, tensors, options=(eps,), plain=plain, update=update if batch else None)


class FastSK(reference.SK):
    """Fused `reference.SK`: same constructor, same ``state_dict``, same result, same running statistics.

    The selection (`sk`) is fused; the convolutions and their batch norms are PyTorch's, and hooks on them run. The op
    reads the parameters of the other layers. If these are not as built, they are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed branches, ``[N, C, H, W]``; see `sk`."""
        if not as_built(self, x, self.LAYERS):
            return super().forward(x)
        return sk(*self.branches(x), *self.weights(), **self.norm_step()).to(x.dtype)
