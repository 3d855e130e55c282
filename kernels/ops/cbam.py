"""CBAM and its two halves, channel and spatial attention: launchers of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.launch import device_guard
from ..core.layout import accumulation_dtype, canonical
from ..passes.gate import apply_gates, gate_grads
from ..passes.input_grad import Terms, input_grad
from ..passes.map_grads import map_grads, map_grads_reduction
from ..passes.mlp import pooled_gate, pooled_gate_bwd
from ..passes.partials import combine
from ..passes.pool import mean_max_c, pool_hw
from ..passes.spatial_conv import conv_gate, conv_gate_bwd


def channel_attention_fwd(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Computes gate = sigmoid(w2 (relu(w1 mean) + relu(w1 max))), mean and max over H and W.

    x [N, C, H, W]; w1 [R, C], w2 [C, R] (or 1x1 filters), any dtype. Returns gate [N, C, 1, 1] in x's dtype, pooled
    [N, 2, C], argmax_hw [N, C] (int32, h * W + w), hidden [N, 2, R]. Reads x once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        gate = x.new_empty((layout.N, layout.C, 1, 1))
        pooled, argmax_hw, hidden = pooled_gate(pool_hw(x, layout, with_max=True), w1, None, w2, None, gate)
        return gate, pooled, argmax_hw, hidden


def channel_attention_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    gate: torch.Tensor,
    pooled: torch.Tensor,
    argmax_hw: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Computes dx = dmean / HW + dmax at argmax_hw from grad [N, C, 1, 1], and the weights' gradients.

    Returns dx, dw1, dw2. Writes dx, does not read x.
    """
    with device_guard(x):
        x, layout = canonical(x)
        dgate = grad.contiguous().view(layout.N, 1, layout.C)
        dpooled, mlp = pooled_gate_bwd(dgate, gate, w1, w2, pooled, hidden, biases=False)
        return input_grad(x, layout, Terms(dpooled=dpooled, argmax_hw=argmax_hw), mlp=mlp), *mlp.results


def spatial_attention_fwd(
    x: torch.Tensor, wconv: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes gate = sigmoid(conv([mean, max]) + bias), mean and max over C, zero padding k // 2.

    x [N, C, H, W]; wconv [1, 2, k, k], k odd, bias [1], any dtype. Returns gate [N, 1, H, W] in x's dtype, maps
    [N, 2, H, W], argmax_c [N, H, W] (int32). Reads x once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        maps, argmax_c = mean_max_c(x, None, layout)
        gate = conv_gate(maps, wconv, bias, x.new_empty((layout.N, 1, layout.H, layout.W)))
        return gate, maps, argmax_c


def spatial_attention_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    wconv: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor,
    maps: torch.Tensor,
    argmax_c: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Computes dx = dmean_map / C + dmax_map at argmax_c from grad [N, 1, H, W], and the convolution's gradients.

    Returns dx, dwconv, dbias. Writes dx, does not read x.
    """
    with device_guard(x):
        x, layout = canonical(x)
        dgate = grad.contiguous().view(layout.N, 1, layout.HW)
        dlogits = combine(dgate, gate, maps.new_empty((layout.N, layout.HW)))
        dmaps, sums = conv_gate_bwd(dlogits, wconv, bias, maps)
        return input_grad(x, layout, Terms(dmaps=dmaps, argmax_c=argmax_c), sums=sums), *(s.out for s in sums)


def cbam_fwd(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    wconv: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes y = act(u * spatial_gate + residual), u = x * channel_gate; the gates as in the halves, the second of u.

    x, residual [N, C, H, W]. Returns y, pooled [N, 2, C], argmax_hw [N, C], hidden [N, 2, R], channel_gate [N, C],
    maps [N, 2, H, W], argmax_c [N, H, W], spatial_gate [N, H, W]. Moves 4 times the bytes of x: read to pool over
    pixels, read to pool over channels, read to scale, write y; one more for a residual. u is never stored.
    """
    with device_guard(x):
        x, layout = canonical(x)
        channel_gate = x.new_empty((layout.N, layout.C), dtype=accumulation_dtype(x))
        pooled, argmax_hw, hidden = pooled_gate(pool_hw(x, layout, with_max=True), w1, None, w2, None, channel_gate)
        maps, argmax_c = mean_max_c(x, channel_gate, layout)
        spatial_gate = conv_gate(maps, wconv, bias, maps.new_empty((layout.N, layout.H, layout.W)))
        y = apply_gates(x, layout, channel_gate, spatial_gate, residual, activation)
        return y, pooled, argmax_hw, hidden, channel_gate, maps, argmax_c, spatial_gate


def cbam_bwd(
    grad: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    wconv: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    pooled: torch.Tensor,
    argmax_hw: torch.Tensor,
    hidden: torch.Tensor,
    channel_gate: torch.Tensor,
    maps: torch.Tensor,
    argmax_c: torch.Tensor,
    spatial_gate: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    """Computes dx and the weights' gradients from g' = grad * act'(x * channel_gate * spatial_gate + residual).

    dx = (g' * spatial_gate + dmean_map / C + dmax_map at argmax_c) * channel_gate + dmean / HW + dmax at argmax_hw.
    Returns dx, dresidual, dw1, dw2, dwconv, dbias. Moves 5 times the bytes of x: (1) read grad and x, for the sums over
    channels and over pixels together; (2) read x, for the maps' share of the channel gate's gradient; (3) read grad,
    write dx. With an activation, (1) also writes g', returned as dresidual (else empty: it is grad), and reads a
    residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        g, dresidual, dchannel, dspatial = gate_grads(
            grad,
            x,
            layout,
            channel_gate,
            spatial_gate,
            residual,
            activation,
            more_partials=map_grads_reduction(layout).splits,
        )
        assert dspatial is not None
        dlogits = combine(dspatial, spatial_gate, maps.new_empty((layout.N, layout.HW)))
        dmaps, sums = conv_gate_bwd(dlogits, wconv, bias, maps)
        map_grads(x, layout, dmaps, argmax_c, dchannel)
        dpooled, mlp = pooled_gate_bwd(dchannel, channel_gate, w1, w2, pooled, hidden, biases=False)
        terms = Terms(g, channel_gate, spatial_gate, dpooled, argmax_hw, dmaps, argmax_c)
        dx = input_grad(x, layout, terms, mlp=mlp, sums=sums)
        return dx, dresidual, *mlp.results, *(s.out for s in sums)
