"""Gradients of LocalAttention's gates: of both before their sigmoids, and of the perceptron's weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.activations import SIGMOID, gate_grad
from ..core.heuristics import Tile, cdiv, next_power_of_2, registers_for, split
from ..core.launch import launch
from ..core.layout import Layout, contiguous
from ..core.product import add_product, product
from ..core.tiles import bound_if, load_pixels, tile_mask, x_offsets
from .gate import MULTIPLIED
from .partials import partials_sum
from .pixel_gate import PixelGrads, Upstream, pixel_grads, upstream_tile
from .pixel_mlp import PixelMLPWeights, masked_by_signs, product_tile, unit_block
from .weight_grads import MLPGrads, mlp_grads_first

FEWER = 4  # times fewer programs than in other reductions: each leaves sums as large as a tile
WIDEST, HELD = 256, 64  # channels and hidden units that a program can hold
SUMS = 8192  # products of them that it can sum up meanwhile
PARTIALS = 16384  # partial sums that a program puts together at a time


@triton.jit
def _store_sums(sums_ptr, counts_ptr, sums, counts, total, share, c, s, C, S, with_counts, with_total):
    mask = (c < C)[:, None] & (s < S)[None, :]
    tl.store(sums_ptr + (share * S + s[None, :]) * C + c[:, None], sums, mask=mask)
    tl.store(counts_ptr + share * (S + 1) + s, counts, mask=s < bound_if(with_counts, S))
    tl.store(counts_ptr + share * (S + 1) + S, tl.sum(total, 0), mask=with_total)


@triton.jit
def _pixel_mlp_grads_kernel(
    upstream,
    spatial_gate_ptr,
    signs_ptr,
    sums_ptr,
    counts_ptr,
    dlogits_ptr,
    tiles,
    size,
    S,
    steps,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """All sums of g' x and x in one read of both, by programs that hold all channels of their pixels.

    Stores g' and dlogits [N, HW]; dchannel [N, blocks of pixels, C], the sums of g' x * spatial_gate over a block; and,
    over the tiles of all images that a program walks, sums [splits, S, C] of mask dlogits x, and counts [splits, S + 1]
    of mask dlogits and, last, of dlogits.
    """
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    acc_ty = upstream.channel_gate.dtype.element_ty
    blocks = tl.cdiv(size.HW, BLOCK_P)
    c = tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_C, BLOCK_S], acc_ty)
    counts = tl.zeros([BLOCK_S], acc_ty)
    total = tl.zeros([BLOCK_P], acc_ty)
    first = tl.program_id(0) * steps
    for tile in range(first, min(first + steps, tiles)):
        n = (tile // blocks).to(tl.int64)
        block = tile % blocks
        p = block * BLOCK_P + tl.arange(0, BLOCK_P)
        spatial_gate = load_pixels(spatial_gate_ptr, n, p, size)
        row = (n * blocks + block) * size.C
        x, dspatial = upstream_tile(upstream, spatial_gate, n, row, c, p, size, ACTIVATION, MULTIPLIED, TILE)
        dlogits = dspatial * gate_grad(spatial_gate, SIGMOID)
        tl.store(dlogits_ptr + n * size.HW + p, dlogits, mask=p < size.HW)
        masked = masked_by_signs(dlogits, signs_ptr, n, s, p, S, size.HW)
        sums = add_product(x, masked, sums, PRODUCT)
        counts += tl.sum(masked, 0)
        total += dlogits
    share = tl.program_id(0).to(tl.int64)
    _store_sums(sums_ptr, counts_ptr, sums, counts, total, share, c, s, size.C, S, True, True)


@triton.jit
def _pixel_mlp_sums_kernel(
    x_ptr,
    dlogits_ptr,
    signs_ptr,
    sums_ptr,
    counts_ptr,
    tiles,
    size,
    S,
    steps,
    PRODUCT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same sums [splits, S, C] and counts [splits, S + 1] alone, by blocks of channels and hidden units."""
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    acc_ty = dlogits_ptr.dtype.element_ty
    blocks = tl.cdiv(size.HW, BLOCK_P)
    blocks_c = tl.cdiv(size.C, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(0) // blocks_c * BLOCK_S + tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_C, BLOCK_S], acc_ty)
    counts = tl.zeros([BLOCK_S], acc_ty)
    total = tl.zeros([BLOCK_P], acc_ty)
    first = tl.program_id(1) * steps
    for tile in range(first, min(first + steps, tiles)):
        n = (tile // blocks).to(tl.int64)
        p = tile % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = tile_mask(c, p, size, TILE)
        x = tl.load(x_ptr + x_offsets(n, c, p, size, TILE), mask=mask, other=0.0)
        dlogits = load_pixels(dlogits_ptr, n, p, size)
        masked = masked_by_signs(dlogits, signs_ptr, n, s, p, S, size.HW)
        sums = add_product(x, masked, sums, PRODUCT)
        counts += tl.sum(masked, 0)
        total += dlogits
    share = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    _store_sums(sums_ptr, counts_ptr, sums, counts, total, share, c, s, size.C, S, block % blocks_c == 0, block == 0)


@triton.jit(do_not_specialize=["N"])
def _pixel_mlp_weights_kernel(
    mlp,
    N,
    sums_ptr,
    counts_ptr,
    weights,
    dweights,
    product_ptr,
    splits,
    C,
    S,
    MLP: tl.constexpr,
    SUM_S: tl.constexpr,
    SUM_C: tl.constexpr,
):
    """The gradients of the channel gate's weights, then of the perceptron's, a hidden unit in each program.

    From partials of S and t: dp1 = p2 S, dq1 = p2 t, dp2 = p1 S + q1 t, dq2 = sum dlogits. product [S, C] is p2 p1.
    """
    program = mlp_grads_first(tl.program_id(0), mlp, N, MLP)
    if program >= 0:
        acc_ty = sums_ptr.dtype.element_ty
        s = program + tl.arange(0, 1)
        p2 = tl.load(weights.p2 + s).to(acc_ty)
        dp2 = tl.zeros([SUM_C], acc_ty)
        for start in range(0, C, SUM_C):
            c = start + tl.arange(0, SUM_C)
            k = program * C + c
            p1 = tl.load(weights.p1 + k, mask=c < C, other=0.0).to(acc_ty)
            total = tl.where(c < C, partials_sum(sums_ptr, 0, k, S * C, splits, 1, SUM_S), 0.0)
            dp2 += p1 * total
            tl.store(dweights.p1 + k, p2 * total, mask=c < C)
            tl.store(product_ptr + k, p2 * p1, mask=c < C)
        count = partials_sum(counts_ptr, 0, s, S + 1, splits, 1, SUM_S)
        tl.store(dweights.q1 + s, p2 * count)
        tl.store(dweights.q2 + s, partials_sum(counts_ptr, 0, S + s, S + 1, splits, 1, SUM_S), mask=s == 0)
        q1 = tl.zeros([1], acc_ty)
        if weights.q1 is not None:
            q1 = tl.load(weights.q1 + s).to(acc_ty)
        tl.store(dweights.p2 + s, tl.sum(dp2, 0) + q1 * count)


def _fits(layout: Layout, S: int) -> bool:
    """True if a program can hold all channels of its pixels, and their sums with all hidden units."""
    return layout.C <= WIDEST and S <= HELD and unit_block(S, HELD) * unit_block(layout.C, WIDEST) <= SUMS


def _grads_tile(layout: Layout, itemsize: int) -> Tile:
    """Returns a tile of all channels; as many pixels as leave registers for the sums and shared memory for copies."""
    block_c = unit_block(layout.C, WIDEST)
    block_p = unit_block(layout.HW, min(max(16384 // itemsize // block_c, 16), 128))
    per_warp = 2048 // itemsize if layout.align >= 8 else 512
    return Tile(layout.channels_last, layout.align, block_c, block_p, min(max(block_c * block_p // per_warp, 1), 8))


def _registers(x: torch.Tensor, t: Tile, activation: int) -> dict[str, int]:
    """Caps registers per thread if the compiler would take a few more than leave room for a second program.

    Two programs on an SM hide each other's sums, and all programs run at once. On other chips the cap would spill.
    """
    few = x.element_size() == 2 and t.ALIGN >= 8 and t.num_warps == 8 and not activation
    if not (few and x.is_cuda and torch.version.cuda) or torch.cuda.get_device_capability(x.device) != (9, 0):
        return {}
    return {"maxnreg": 128}


def _stages(x: torch.Tensor, t: Tile, S: int, maps: int) -> int:
    """Returns how many tiles of each map may be in flight beside the hidden units' in 99 KB, which many cards have."""
    return 2 if maps * t.BLOCK_C * t.BLOCK_P * x.element_size() > 40 << 10 or S > HELD // 2 else 3


def pixel_mlp_grads(
    grad: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    p1: torch.Tensor,
    channel_gate: torch.Tensor,
    spatial_gate: torch.Tensor,
    signs: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
) -> tuple[PixelGrads, torch.Tensor, torch.Tensor]:
    """Returns both gates' gradients, and partials of the perceptron's sums [splits, S, C] and counts [splits, S + 1].

    Reads grad and x once if the sums fit a program. Otherwise reads x a second time, as dlogits needs all channels
    first.
    """
    if not _fits(layout, p1.shape[0]):
        d = pixel_grads(grad, x, layout, channel_gate, spatial_gate, residual, activation, MULTIPLIED)
        return d, *_sums(x, layout, p1, d.dlogits, signs)
    N, C, HW, S = layout.N, layout.C, layout.HW, p1.shape[0]
    new = channel_gate.new_empty
    t = _grads_tile(layout, x.element_size())
    blocks = cdiv(HW, t.BLOCK_P)
    splits, steps = split(FEWER, N * blocks)
    sums, counts = new((splits, S, C)), new((splits, S + 1))
    dchannel, dlogits = new((N, blocks, C)), new((N, HW))
    grad, residual = layout.dense(grad), layout.dense_or_none(residual)
    dresidual = layout.empty_dresidual(x, activation)
    launch(
        _pixel_mlp_grads_kernel,
        splits,
        Upstream(grad, x, residual, channel_gate, dresidual if activation else None, dchannel),
        spatial_gate,
        signs,
        sums,
        counts,
        dlogits,
        N * blocks,
        layout.sizes,
        S,
        steps,
        ACTIVATION=activation,
        PRODUCT=product(x, p1),
        BLOCK_S=unit_block(S, HELD),
        TILE=t,
        num_warps=t.num_warps,
        num_stages=_stages(x, t, S, 3 if activation else 2),
        **_registers(x, t, activation),
    )
    return PixelGrads(dresidual if activation else grad, dresidual, dchannel, dlogits, None, None), sums, counts


def _sums(
    x: torch.Tensor, layout: Layout, p1: torch.Tensor, dlogits: torch.Tensor, signs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums and counts of `_pixel_mlp_sums_kernel`. Reads x once."""
    S, block_s = p1.shape[0], unit_block(p1.shape[0], 64)
    t = product_tile(layout, x.element_size(), 64, 128 // x.element_size())
    programs, tiles = cdiv(layout.C, t.BLOCK_C) * cdiv(S, block_s), layout.N * cdiv(layout.HW, t.BLOCK_P)
    splits, steps = split(programs, tiles)
    sums, counts = dlogits.new_empty((splits, S, layout.C)), dlogits.new_empty((splits, S + 1))
    launch(
        _pixel_mlp_sums_kernel,
        programs,
        x,
        dlogits,
        signs,
        sums,
        counts,
        tiles,
        layout.sizes,
        S,
        steps,
        PRODUCT=product(x, p1),
        BLOCK_S=block_s,
        TILE=t,
        num_warps=t.num_warps,
        num_stages=2,
        splits=splits,
    )
    return sums, counts


def pixel_mlp_weight_grads(
    mlp: MLPGrads,
    sums: torch.Tensor,
    counts: torch.Tensor,
    p1: torch.Tensor,
    q1: torch.Tensor | None,
    p2: torch.Tensor,
) -> tuple[torch.Tensor, PixelMLPWeights]:
    """Returns p2 p1 [S, C], and the perceptron's gradients from `pixel_mlp_grads`' partials; writes mlp's, too."""
    splits, S, C = sums.shape
    dweights = PixelMLPWeights(p1.new_empty(p1.shape), p1.new_empty(S), p2.new_empty(p2.shape), p2.new_empty(1))
    weight, block_s, m = sums.new_empty((S, C)), next_power_of_2(splits), mlp.tile()
    launch(
        _pixel_mlp_weights_kernel,
        mlp.programs(m) + S,
        mlp.operands,
        mlp.images,
        sums,
        counts,
        PixelMLPWeights(p1.contiguous(), contiguous(q1), p2.contiguous(), None),
        dweights,
        weight,
        splits,
        C,
        S,
        MLP=m,
        SUM_S=block_s,
        SUM_C=min(next_power_of_2(C), PARTIALS // block_s),
        num_warps=8,
        **registers_for(sums, 8),
    )
    return weight, dweights
