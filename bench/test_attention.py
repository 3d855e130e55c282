"""Times attention over maps with a relative position bias: fused, PyTorch's with the bias expanded, FlexAttention.

``pytest bench/test_attention.py --benchmark-only``; ``--all-shapes`` runs 49 to 4096 positions. Every contender takes
the same packed queries, keys and values. In mode ``both`` it returns the gradients of these and of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import visattn_fast as vf
from bench.clock import DEVICE, measure, timed
from visattn_fast.backends import backends
from visattn_fast.measure.step import TRAINING, Results, step
from visattn_fast.reference.self_attention import relative_bias, split_heads

HEADS = 4
TOKENS = 4096 if DEVICE.type == "cuda" else 1024  # tokens in a batch; a batch has at least one image
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def fused(qkv: Tensor, table: Tensor) -> Tensor:
    """The kernels of this package. On an untested GPU they do not serve unless asked for."""
    with vf.use_backend("triton" if DEVICE.type == "cuda" and backends(DEVICE)["triton"].available else "auto"):
        return vf.functional.attention2d(qkv, table)[0]


def sdpa(qkv: Tensor, table: Tensor) -> Tensor:
    """`scaled_dot_product_attention` with the bias expanded to all pairs of positions."""
    bias = relative_bias(table, *qkv.shape[1:3])[None].to(qkv.dtype)
    out = F.scaled_dot_product_attention(*split_heads(qkv, None), attn_mask=bias)
    return out.transpose(1, 2).unflatten(1, qkv.shape[1:3])


def flex(qkv: Tensor, table: Tensor) -> Tensor:
    """FlexAttention. Like the fused kernels it reads the bias from the table."""
    from torch.nn.attention.flex_attention import flex_attention

    width, (rows, columns, _) = qkv.shape[2], table.shape

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[i // width - j // width + rows // 2, i % width - j % width + columns // 2, head]

    q, k, v = (t.contiguous() for t in split_heads(qkv, None))
    return flex_attention(q, k, v, score_mod=add_bias).transpose(1, 2).unflatten(1, qkv.shape[1:3])


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sdpa": sdpa, "flex": flex, "fused": fused}


def make_run(contender: str, mode: str, qkv: Tensor, table: Tensor) -> Callable[[], Results]:
    """Makes a run of ``contender`` in ``mode``; FlexAttention is compiled."""
    function = CONTENDERS[contender]
    if contender == "flex":
        torch.compiler.reset()
        function = torch.compile(function)
    grad = torch.ones(*qkv.shape[:3], *qkv.shape[4:], dtype=qkv.dtype, device=qkv.device)
    return step(mode, function, (qkv, table), (qkv, table), grad)


@timed
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("d", [32, 64])
def test_attention(benchmark: Any, d: int, contender: str, size: tuple[int, int], mode: str) -> None:
    if contender == "flex" and mode in TRAINING and DEVICE.type == "cpu":
        pytest.skip("FlexAttention has no backward pass on CPUs")
    height, width = size
    images = max(TOKENS // (height * width), 1)
    generator = torch.Generator().manual_seed(0)
    qkv, table = (
        torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_()
        for s, dtype in (
            ((images, height, width, 3, HEADS, d), DTYPE),
            ((2 * height - 1, 2 * width - 1, HEADS), torch.float32),
        )
    )
    run = make_run(contender, mode, qkv, table)
    found, expected = run(), make_run("sdpa", mode, qkv.detach().float().requires_grad_(), table)()
    for got, want in zip(found, expected, strict=True):  # all contenders compute the same
        assert (got.float() - want).abs().max() <= torch.finfo(DTYPE).eps ** 0.5 * want.abs().max()
    group = f"{images}x{height}x{width}, {HEADS} heads of {d}, {mode}"
    measure(benchmark, run, group, qkv, dtype=str(DTYPE), positions=height * width)
