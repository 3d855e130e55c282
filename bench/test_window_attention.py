"""Window attention at Swin-T's four stages: ours, timm's block with roll, partition and reverse, and that compiled.

``pytest bench/test_window_attention.py --benchmark-only``; it needs timm. Every contender has the same weights, takes
the same token grid, and in mode ``both`` gives the gradients of it and of every parameter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import visattn_fast as vf
from bench.clock import DEVICE, measure, timed
from outside import library
from visattn_fast.report.steps import Results, step

IMAGES, WINDOW, SHIFT = 4, 7, 3
STAGES = {(56, 96): 3, (28, 192): 6, (14, 384): 12, (7, 768): 24}  # side of the map and channels -> heads
CONTENDERS = ("timm", "timm compiled", "fused")


def modules(side: int, channels: int, heads: int) -> tuple[nn.Module, nn.Module]:
    """timm's block, and ours with the weights of its attention."""
    swin = library("timm.models.swin_transformer")
    torch.manual_seed(0)
    block = swin.SwinTransformerBlock(channels, (side, side), heads, window_size=WINDOW, shift_size=SHIFT)
    fused = vf.FastWindowAttention2d(channels, WINDOW, heads, SHIFT, layout="nhwc", pad_first=False)
    fused.load_state_dict(block.attn.state_dict())
    return block.to(DEVICE), fused.to(DEVICE)


def run_of(function: Callable[[Tensor], Tensor], module: nn.Module, mode: str, x: Tensor) -> Callable[[], Results]:
    module.train(mode != "inference")
    return step(mode, function, (x,), (x, *module.parameters()), torch.ones_like(x))


@timed
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("side", "channels"), STAGES)
def test_stage(benchmark, side, channels, contender, mode):
    block, ours = modules(side, channels, STAGES[side, channels])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, side, side, channels, generator=generator).to(DEVICE).requires_grad_()
    expected = run_of(block._attn, block.attn, mode, x)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"timm": block._attn, "fused": ours}
    if contender == "timm compiled":
        torch.compiler.reset()
        functions[contender] = torch.compile(block._attn)
    run = run_of(functions[contender], ours if contender == "fused" else block.attn, mode, x)
    for got, want in zip(run()[:2], expected()[:2], strict=True):  # what is timed is the same computation
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    group = f"{IMAGES}x{side}x{side}x{channels}, window {WINDOW}, shifted, {mode}"
    measure(benchmark, run, group, x, heads=STAGES[side, channels])
