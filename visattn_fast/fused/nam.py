"""Normalization-based attention."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.nam import NAM
from ..reference.batch_norm import batch_norm_step
from ..reference.checks import check_batch_norm, check_feature_map
from .serve import serve_batch_norm

__all__ = ["FastNAM", "nam"]


def nam(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x * sigmoid(bn(x) * abs(weight) / sum(abs(weight))) + residual)``; no gradient through the quotient.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        weight, bias, running_mean, running_var, training, momentum, eps: of the batch norm, as in `F.batch_norm`; in
            training the running statistics are updated in place.
        residual, activation: as in `se`.

    Returns, raises: as `se`; ValueError for a single value per channel in training.

    Source: Liu et al., "NAM: Normalization-based Attention Module", NeurIPS workshops 2021.
    """
    check_batch_norm(x, weight, bias, running_mean, running_var, training, eps)
    return serve_batch_norm(
        NAM,
        reference.nam,
        (x,),
        weight,
        bias,
        (running_mean, running_var),
        training=training,
        momentum=momentum,
        eps=eps,
        residual=residual,
        activation=activation,
    )


class FastNAM(reference.NAM):
    """`reference.NAM`, fused: same constructor, same ``state_dict``, same result, same running statistics.

    Hooks on its batch norm do not run: the fused op reads its parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(nam(x) + residual)``; see `nam`."""
        bn = self.bn2
        check_feature_map(x, bn.num_features)
        batch = bn.training or bn.running_mean is None
        check_batch_norm(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, batch, bn.eps
        )  # before the batch is counted
        training, momentum = batch_norm_step(bn)
        return nam(
            x,
            bn.weight,
            bn.bias,
            bn.running_mean,
            bn.running_var,
            training,
            momentum,
            bn.eps,
            residual=residual,
            activation=activation,
        )
