"""Products of tiles on matrix units: of what, and how exact."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, as `product` says."""
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION, out_dtype=acc.dtype)


def product(x: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
    """What matrix units multiply: 16-bit maps and weights as they are, float32 as six products of bfloat16 parts.

    Triton's interpreter (x on the CPU) would multiply bfloat16 as integers, and has no such parts.
    """
    if x.dtype == torch.float64:
        return {"DOT": tl.float64, "PRECISION": "ieee"}
    if x.is_cpu or x.dtype == torch.float32 or w.dtype != x.dtype:
        return {"DOT": tl.float32, "PRECISION": "ieee" if x.is_cpu else "bf16x6"}
    return {"DOT": tl.float16 if x.dtype == torch.float16 else tl.bfloat16, "PRECISION": "ieee"}
