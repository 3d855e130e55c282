"""Products of tiles on matrix units, and their precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Product(NamedTuple):
    """The dtype that matrix units multiply, and `tl.dot`'s input precision."""

    DOT: Any
    PRECISION: str


def product(x: torch.Tensor, w: torch.Tensor) -> Product:
    """Returns how to multiply x by w: 16-bit numbers as they are, float32 as six products of bfloat16 parts.

    Triton's interpreter, for x on the CPU, would multiply bfloat16 as integers, and has no such parts.
    """
    if x.dtype == torch.float64:
        return Product(tl.float64, "ieee")
    if x.is_cpu or x.dtype == torch.float32 or w.dtype != x.dtype:
        return Product(tl.float32, "ieee" if x.is_cpu else "bf16x6")
    return Product(tl.float16 if x.dtype == torch.float16 else tl.bfloat16, "ieee")


@triton.jit
def add_product(a, b, acc, PRODUCT: tl.constexpr):
    """Returns acc + a b, multiplied as PRODUCT says, which has the fields of `Product`."""
    DOT: tl.constexpr = PRODUCT.DOT
    PRECISION: tl.constexpr = PRODUCT.PRECISION  # Triton 3.6 does not accept a string that is a field
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def add_exact_product(a, b, acc):
    """Returns acc + a b, multiplied in acc's dtype."""
    return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
