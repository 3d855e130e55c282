"""Kernels with one deliberate fault each, which the tools must report. Their launchers take x [N, C, H, W]."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def _three_passes_kernel(x_ptr, y_ptr, P, BLOCK: tl.constexpr):
    """Computes y = x - sum(x) / P in three passes over x, since it pools twice; two passes are enough."""
    row = tl.program_id(0).to(tl.int64) * P
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(2):
        for start in range(0, P, BLOCK):
            p = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + row + p, mask=p < P, other=0.0).to(tl.float32) / 2
    mean = tl.sum(total, 0) / P
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + p, mask=p < P, other=0.0).to(tl.float32)
        tl.store(y_ptr + row + p, x - mean, mask=p < P)


@triton.jit
def _short_offset_kernel(x_ptr, y_ptr, P, BLOCK: tl.constexpr):
    """Copies x; the offset of a row is a product of 32-bit integers, which overflows."""
    blocks = tl.cdiv(P, BLOCK)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    offsets = (tl.program_id(0) // blocks * P + p).to(tl.int64)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=p < P), mask=p < P)


@triton.jit
def _large_tile_kernel(x_ptr, y_ptr, P, BLOCK: tl.constexpr):
    """Normalises a row with all its elements in registers, which are more than a thread has."""
    row = tl.program_id(0).to(tl.int64) * P
    p = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row + p, mask=p < P, other=0.0).to(tl.float32)
    x -= tl.sum(x, 0) / P
    tl.store(y_ptr + row + p, x / tl.sum(x * x, 0), mask=p < P)


@triton.jit
def _max_kernel(x_ptr, y_ptr, P, RUNNING: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the maximum over P; on a GPU, tl.max and the comparison of a running maximum drop NaN."""
    row = tl.program_id(0).to(tl.int64) * P
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + p, mask=p < P, other=float("-inf")).to(tl.float32)
        best = tl.where(x > best, x, best) if RUNNING else x + best
    tl.store(y_ptr + tl.program_id(0), tl.sum(best, 0) if RUNNING else tl.max(best, 0))


@triton.jit
def _narrow_load_kernel(x_ptr, y_ptr, P, BLOCK: tl.constexpr):
    """Copies x, one element a load, since the compiler cannot know that neighbours share their mask."""
    row = tl.program_id(0).to(tl.int64) * P
    for start in range(0, P, BLOCK):
        p = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + p, mask=(p < P) & (p % 3 < 3), other=0.0)
        tl.store(y_ptr + row + p, x, mask=p < P)


@triton.jit
def _product_kernel(x_ptr, y_ptr, P, SAME: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """Computes y [BLOCK, BLOCK] = x x^T for the first BLOCK rows of x, with STAGES loads in shared memory.

    SAME neighbours share their mask, and are loaded together.
    """
    rows, p = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, P, BLOCK, num_stages=STAGES):
        mask = tl.max_constancy((rows < BLOCK)[:, None] & (start + p < P)[None, :], [1, SAME])
        x = tl.load(x_ptr + rows[:, None] * P + start + p[None, :], mask=mask, other=0.0)
        total = tl.dot(x, tl.trans(x), total)
    tl.store(y_ptr + rows[:, None] * BLOCK + p[None, :], total)


def three_passes(x: torch.Tensor) -> None:
    _launch(_three_passes_kernel, x)


def short_offset(x: torch.Tensor) -> None:
    _launch(_short_offset_kernel, x, blocks=triton.cdiv(x[0, 0].numel(), BLOCK))


def copied_first(x: torch.Tensor) -> None:
    """Copies x in the launcher, beside the fault of the kernel."""
    short_offset(x.clone())


def large_tile(x: torch.Tensor) -> None:
    _launch(_large_tile_kernel, x, BLOCK=triton.next_power_of_2(x[0, 0].numel()), num_warps=16)


def lossy_max(x: torch.Tensor) -> None:
    _launch(_max_kernel, x, x.new_empty(x.shape[:2]), RUNNING=False)


def lossy_running_max(x: torch.Tensor) -> None:
    _launch(_max_kernel, x, x.new_empty(x.shape[:2]), RUNNING=True)


def narrow_load(x: torch.Tensor) -> None:
    _launch(_narrow_load_kernel, x)


def product(x: torch.Tensor) -> None:
    """Has no fault."""
    _product(x, SAME=8, STAGES=3)


def narrow_copy(x: torch.Tensor) -> None:
    _product(x, SAME=2, STAGES=3)


def large_buffers(x: torch.Tensor) -> None:
    _product(x, SAME=8, STAGES=10)


def _product(x: torch.Tensor, **meta: int) -> None:
    _launch(_product_kernel, x, x.new_empty((128, 128), dtype=torch.float32), BLOCK=128, num_warps=8, **meta)


def _launch(kernel: Any, x: torch.Tensor, y: torch.Tensor | None = None, blocks: int = 1, **meta: int) -> None:
    N, C, H, W = x.shape
    kernel[(N * C * blocks, 1)](x, torch.empty_like(x) if y is None else y, H * W, **{"BLOCK": BLOCK, **meta})
