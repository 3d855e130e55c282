"""Triplet attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
from ..ops.autograd import mixed
from ..ops.triplet_attention import FIELDS, TRIPLET_ATTENTION, batch_statistics
from ..reference.as_built import as_built
from ..reference.triplet_attention import PlaneGate, check_triplet_attention
from .calls import call_layers
from .serve import check_epilogue, serve

__all__ = ["FastTripletAttention", "PlaneGate", "triplet_attention"]


def triplet_attention(
    x: Tensor,
    cw: PlaneGate,
    hc: PlaneGate,
    hw: PlaneGate | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``act(x * (gate_cw + gate_hc + gate_hw) / 3 + residual)``; without hw, the mean of two gates.

    A gate is ``sigmoid(bn(conv([max, mean])))`` of one pair of axes, pooled over the third. One read of x pools all
    three axes, and the mean gate is never stored. A maximum sends its gradient to the first of equal elements.

    Args:
        x: ``[N, C, H, W]``, any floating dtype, NCHW or channels_last.
        cw, hc, hw: the gates of the planes ``[C, W]``, ``[H, C]`` and ``[H, W]``, or two gates without hw. In training
            their running statistics, if given, are updated in place.
        residual: added before the activation; x's shape, or None.
        activation: None, ``"relu"`` or ``"silu"``.

    Returns:
        ``[N, C, H, W]`` in x's dtype and memory format; a residual of another dtype promotes the result. Sums are kept
        in float32 (float64 for float64).

    Raises:
        TypeError: a dtype that is not floating-point.
        ValueError: shapes or devices that do not fit, an unknown activation, a single value per batch norm in training,
            no running statistics outside training.
        RuntimeError: the backend asked for cannot serve this call.

    Source: Misra et al., "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021.
    """
    check_triplet_attention(x, cw, hc, hw)
    gates = [cw, hc] if hw is None else [cw, hc, hw]

    def plain() -> Tensor:
        # `mixed` must not pass on copies of the running statistics: they are updated in place.
        def mathematics(x: Tensor, *w: Tensor) -> Tensor:
            weights = zip(gates, w[::3], w[1::3], w[2::3], strict=True)
            given = (g._replace(conv=conv, norm_weight=gain, norm_bias=bias) for g, conv, gain, bias in weights)
            return reference.triplet_attention(x, *given)

        return mixed(mathematics, x, *(w for g in gates for w in g.weights))

    missing = 3 - len(gates)
    tensors = (*(t for g in gates for t in (*g.weights, *g.statistics)), *(None,) * FIELDS * missing)
    eps = (*(float(g.eps) for g in gates), *(0.0,) * missing)

    def update(small: Sequence[Tensor]) -> None:
        for gate, (z, mean, rstd) in zip(gates, batch_statistics(small), strict=False):
            if gate.training and z.numel():
                gate.update(mean, rstd.pow(-2) - gate.eps, z.numel())

    return serve(
        TRIPLET_ATTENTION,
        (x, *tensors),
        options=eps,
        residual=residual,
        activation=activation,
        plain=plain,
        update=update if any(gate.training for gate in gates) else None,
    )


class FastTripletAttention(reference.TripletAttention):
    """`reference.TripletAttention`, fused: same constructor, same ``state_dict``, same result.

    The ops read the parameters of the inner layers. Layers that are not as built are called (docs/guide/tools.md).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """``act(triplet_attention(x) + residual)``; see `triplet_attention`."""
        if not as_built(self, x, self.assumed):
            return call_layers(super().forward, x, residual, activation)
        self.check(x)
        check_epilogue(x, residual, activation)  # before any batch norm counts the batch
        gates = (layer.gate(counts=True) for layer in self.layers())
        return triplet_attention(x, *gates, residual=residual, activation=activation)
