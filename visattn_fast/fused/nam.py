"""Normalization-based attention (NAM), fused."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..ops.nam import NAM
from ..reference.as_built import as_built
from ..reference.batch_norm import batch_norm_step
from ..reference.checks import check_batch_norm
from .calls import call_layers
from .serve import check_epilogue, serve_batch_norm

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
    """Normalization-based attention: ``act(x * sigmoid(bn(x) * abs(weight) / sum(abs(weight))) + residual)``.

    No gradient passes through the quotient.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        weight, bias, running_mean, running_var, training, momentum, eps: the batch norm's arguments, as in
            `torch.nn.functional.batch_norm`. Training updates the running statistics in place.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64); weights may have another dtype than x.

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation, a single value per channel in training.
        RuntimeError: the backend asked for cannot serve this call.

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
    """Fused `reference.NAM`: same constructor, same ``state_dict``, same result, same running statistics.

    The whole module is one op per direction, which reads the parameters of the batch norm. If this layer is not as
    built, it is called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Returns ``act(nam(x) + residual)``; see `nam`."""
        if not as_built(self, x, self.LAYERS):
            return call_layers(super().forward, x, residual, activation)
        self.check(x)
        check_epilogue(x, residual, activation)  # before the batch is counted
        bn = self.bn2
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
