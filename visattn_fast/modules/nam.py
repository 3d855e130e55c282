"""Fused normalization-based attention."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference
from ..reference.batch_norm import batch_norm_step
from ..reference.checks import check_batch_norm, check_feature_map


class FastNAM(reference.NAM):
    """`reference.NAM`, fused: same constructor, same ``state_dict``, same result, same running statistics.

    Hooks on its batch norm do not run: the fused op reads its parameters alone.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(nam(x) + residual)``; see `functional.nam`."""
        bn = self.bn2
        check_feature_map(x, bn.num_features)
        batch = bn.training or bn.running_mean is None
        check_batch_norm(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, batch, bn.eps
        )  # before the batch is counted
        training, momentum = batch_norm_step(bn)
        return functional.nam(
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
