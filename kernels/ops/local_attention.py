"""LocalAttention: launchers of its spatial perceptron's kernels, of the fused forward and backward."""

from __future__ import annotations

import torch

from ..core.heuristics import Tile, cdiv, next_power_of_2, registers_for, splits
from ..core.launch import device_guard, launch
from ..core.layout import Layout, accumulation_dtype, canonical, contiguous
from ..core.product import product
from ..passes.gate import PRODUCT, scale
from ..passes.local_attention import (
    WORD,
    _hidden_dx_kernel,
    _hidden_gate_kernel,
    _hidden_grads_kernel,
    _hidden_sums_kernel,
    _hidden_weights_kernel,
)
from ..passes.mlp import gate_mlp_bwd, pooled_gate
from ..passes.pixel_gate import PixelGrads, both_grads
from ..passes.pool import Parts
from ..passes.weight_grads import MLPGrads

FEWER = 4  # times fewer programs than other reductions have: each leaves sums as large as a tile
WIDEST, HELD = 256, 64  # channels and hidden units that a program can hold
SUMS = 8192  # products of them that it can sum up meanwhile
PARTS = 16384  # parts of such sums that a program puts together at a time


def _units(S: int, limit: int) -> int:
    """Block of hidden units; a product takes no fewer than 16 of anything."""
    return min(max(next_power_of_2(S), 16), limit)


def _tile(layout: Layout, itemsize: int, channels: int, pixels: int, per_warp: int = 1024) -> Tile:
    """Of at most so many channels and pixels; 16 bytes or more per thread of a warp of 64."""
    block_c, block_p = _units(layout.C, channels), _units(layout.HW, pixels)
    num_warps = min(max(block_c * block_p * itemsize // per_warp, 1), 8)
    return Tile(layout.channels_last, layout.align, block_c, block_p, num_warps)


def _grads_tile(layout: Layout, itemsize: int) -> Tile:
    """All channels of so many pixels that the sums have registers, and copies that are under way shared memory."""
    block_c = _units(layout.C, WIDEST)
    block_p = _units(layout.HW, min(max(16384 // itemsize // block_c, 16), 128))
    per_warp = 2048 // itemsize if layout.align >= 8 else 512
    return Tile(layout.channels_last, layout.align, block_c, block_p, min(max(block_c * block_p // per_warp, 1), 8))


def _registers(x: torch.Tensor, t: Tile, activation: int) -> dict[str, int]:
    """A limit of registers a thread, where the compiler would take a few more than a second program leaves room for.

    Two on a multiprocessor hide each other's sums, and all programs run at once. Elsewhere the limit would spill.
    """
    few = x.element_size() == 2 and t.ALIGN >= 8 and t.num_warps == 8 and not activation
    if not (few and x.is_cuda and torch.version.cuda) or torch.cuda.get_device_capability(x.device) != (9, 0):
        return {}
    return {"maxnreg": 128}


def _stages(x: torch.Tensor, t: Tile, S: int, maps: int) -> int:
    """How many tiles of each map may be under way beside the hidden units' in the 99 KB that many cards have."""
    return 2 if maps * t.BLOCK_C * t.BLOCK_P * x.element_size() > 40 << 10 or S > HELD // 2 else 3


def _hidden_gate(
    x: torch.Tensor, layout: Layout, p1: torch.Tensor, q1: torch.Tensor | None, p2: torch.Tensor,
    q2: torch.Tensor | None, like: torch.Tensor,
) -> tuple[Parts, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Parts of the channel means, gate [N, H, W], signs [N, words, H, W]; reads x once. ``like``: the small dtype."""
    N, C, HW, S = layout.N, layout.C, layout.HW, p1.shape[0]
    block_s = _units(S, 256)
    # Whole cache lines of channels, too, and few steps along them: each sums them up, and stores the sums.
    t = _tile(layout, x.element_size(), *((128 // x.element_size(), 64, 2048) if block_s <= 64 else (64, 32)))
    blocks = cdiv(HW, t.BLOCK_P)
    sums, gate = like.new_empty((N, blocks, C)), like.new_empty((N, layout.H, layout.W))
    signs = x.new_empty((N, cdiv(S, WORD.value), layout.H, layout.W), dtype=torch.int32)
    launch(
        _hidden_gate_kernel, N * blocks,
        x, p1.reshape(S, C).contiguous(), contiguous(q1), p2.reshape(-1).contiguous(), q2, sums, gate, signs, C, HW, S,
        layout.stride_n, layout.stride_o, **product(x, p1), MORE=block_s < S, BLOCK_S=block_s, **t._asdict(),
    )  # fmt: skip
    return Parts(sums.view(-1, C), None, blocks, HW), gate, signs


def _fits(layout: Layout, S: int) -> bool:
    """Whether a program can hold all channels of its pixels, and their sums with all hidden units."""
    return layout.C <= WIDEST and S <= HELD and _units(S, HELD) * _units(layout.C, WIDEST) <= SUMS


def _hidden_grads(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, p1: torch.Tensor, channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor, signs: torch.Tensor, residual: torch.Tensor | None, activation: int,
) -> tuple[PixelGrads, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Those of both gates, and of the perceptron the parts of sums [parts, S, C] and counts [parts, S + 1].

    Reads grad and x once where the sums fit a program; else x a second time, as dz wants all channels first.
    """
    N, C, HW, S = layout.N, layout.C, layout.HW, p1.shape[0]
    new = channel_gate.new_empty
    if not _fits(layout, S):
        d = both_grads(grad, x, layout, channel_gate, spatial_gate, residual, activation, PRODUCT)
        block_s, t = _units(S, 64), _tile(layout, x.element_size(), 64, 128 // x.element_size())
        programs, tiles = cdiv(C, t.BLOCK_C) * cdiv(S, block_s), N * cdiv(HW, t.BLOCK_P)
        parts, steps = splits(programs, tiles)
        sums, counts = new((parts, S, C)), new((parts, S + 1))
        launch(
            _hidden_sums_kernel, programs,
            x, d.dz, signs, sums, counts, tiles, C, HW, S, layout.stride_n, layout.stride_o, steps,
            **product(x, p1), BLOCK_S=block_s, **t._asdict(), parts=parts, num_stages=2,
        )  # fmt: skip
        return d, sums, counts
    t = _grads_tile(layout, x.element_size())
    blocks = cdiv(HW, t.BLOCK_P)
    parts, steps = splits(FEWER, N * blocks)
    sums, counts = new((parts, S, C)), new((parts, S + 1))
    dchannel, dz = new((N, blocks, C)), new((N, HW))
    grad = layout.dense(grad)
    dresidual = layout.empty(x) if activation else x.new_empty(0)
    launch(
        _hidden_grads_kernel, parts,
        grad, x, None if residual is None else layout.dense(residual), channel_gate, spatial_gate, signs,
        dresidual if activation else None, dchannel, sums, counts, dz, N * blocks, C, HW, S,
        layout.stride_n, layout.stride_o, steps, ACTIVATION=activation, COMBINE=PRODUCT.value, **product(x, p1),
        BLOCK_S=_units(S, HELD), num_stages=_stages(x, t, S, 3 if activation else 2),
        **t._asdict(), **_registers(x, t, activation),
    )  # fmt: skip
    return PixelGrads(dresidual if activation else grad, dresidual, dchannel, dz, None, None), sums, counts


def _hidden_weights(
    mlp: MLPGrads, sums: torch.Tensor, counts: torch.Tensor, p1: torch.Tensor, q1: torch.Tensor | None,
    p2: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """p2 p1 [S, C], and the perceptron's gradients, of which `_hidden_grads` has parts; writes those of mlp, too."""
    parts, S, C = sums.shape
    weights = p1.new_empty(p1.shape), p1.new_empty(S), p2.new_empty(p2.shape), p2.new_empty(1)
    weight, block_s = sums.new_empty((S, C)), next_power_of_2(parts)
    launch(
        _hidden_weights_kernel, mlp.programs() + S,
        *mlp.arguments, sums, counts, p1.contiguous(), contiguous(q1), p2.contiguous(), *weights, weight, parts, S,
        **mlp.meta(), SUM_S=block_s, SUM_L=min(next_power_of_2(C), PARTS // block_s), num_warps=8,
        **registers_for(sums, 8),
    )  # fmt: skip
    return weight, [*weights]


def _hidden_dx(
    grad: torch.Tensor, x: torch.Tensor, layout: Layout, channel_gate: torch.Tensor, spatial_gate: torch.Tensor,
    dmean: torch.Tensor, p1: torch.Tensor, weight: torch.Tensor, dz: torch.Tensor, signs: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    C, HW, S = layout.C, layout.HW, p1.shape[0]
    dx = layout.empty(x)
    # Of few warps: each pays for addresses and for the product's operands. One step has nothing to fetch ahead.
    t, block_s = _tile(layout, x.element_size(), 64, 128 // x.element_size(), 2048), _units(S, 32)
    launch(
        _hidden_dx_kernel, layout.N * cdiv(C, t.BLOCK_C) * cdiv(HW, t.BLOCK_P),
        grad, channel_gate, spatial_gate, dmean, weight, dz, signs, dx, C, HW, S,
        **product(x, p1), BLOCK_S=block_s, **t._asdict(), num_stages=1 if block_s >= S else 2,
    )  # fmt: skip
    return dx


def local_attention_fwd(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None,
    p1: torch.Tensor, q1: torch.Tensor | None, p2: torch.Tensor, q2: torch.Tensor | None,
    residual: torch.Tensor | None, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """y = act(x * channel_gate * spatial_gate + residual), the gates sigmoid(w2 relu(w1 mean + b1) + b2), mean over

    H and W, and sigmoid(p2 relu(p1 x + q1) + q2). x, residual [N, C, H, W]; w1 [R, C], w2 [C, R], p1 [S, C], p2 [1, S]
    (or 1x1 filters), any dtype. Returns y, mean [N, C], hidden [N, R], channel_gate [N, C], spatial_gate [N, H, W],
    signs [N, words, H, W]. Moves 3 times the bytes of x: read for the means and the spatial gate, read to scale, write
    y; one more for a residual.
    """
    with device_guard(x):
        x, layout = canonical(x)
        like = x.new_empty(0, dtype=accumulation_dtype(x))
        parts, spatial_gate, signs = _hidden_gate(x, layout, p1, q1, p2, q2, like)
        channel_gate = like.new_empty((layout.N, layout.C))
        mean, _, hidden = pooled_gate(parts, w1, b1, w2, b2, channel_gate)
        y = scale(x, layout, channel_gate, spatial_gate, residual, activation)
        return y, mean, hidden, channel_gate, spatial_gate, signs


def local_attention_bwd(
    grad: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, p1: torch.Tensor,
    q1: torch.Tensor | None, p2: torch.Tensor, residual: torch.Tensor | None, mean: torch.Tensor, hidden: torch.Tensor,
    channel_gate: torch.Tensor, spatial_gate: torch.Tensor, signs: torch.Tensor, activation: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dw1, db1, dw2, db2, dp1, dq1, dp2, dq2), g' = grad * act'(x * gates + residual),

    dx = g' * channel_gate * spatial_gate + (p2 p1)^T (mask dz) + dmean / HW. Moves 4 times the bytes of x: read grad
    and x, read grad, write dx; where a program cannot hold all channels, 5: p1's gradient wants dz, a sum over them,
    before it reads x. With an activation, g' is written once more and returned as dresidual (else empty: it is grad),
    and a residual is read once.
    """
    with device_guard(x):
        x, layout = canonical(x)
        if not layout.N:
            dresidual = layout.empty(x) if activation else x.new_empty(0)
            biased = (p for w in (w1, w2, p1, p2) for p in (w.new_zeros(w.shape), w.new_zeros(w.shape[0])))
            return layout.empty(x), dresidual, *biased
        d, sums, counts = _hidden_grads(grad, x, layout, p1, channel_gate, spatial_gate, signs, residual, activation)
        dmean, mlp = gate_mlp_bwd(d.parts, channel_gate, w1, w2, mean, hidden)
        weight, dhidden = _hidden_weights(mlp, sums, counts, p1, q1, p2)
        dx = _hidden_dx(d.g, x, layout, channel_gate, spatial_gate, dmean, p1, weight, d.dz, signs)
        return dx, d.dresidual, *mlp.results, *dhidden
