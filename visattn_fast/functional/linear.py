"""Linear layers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..backends import reference_asked


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of tokens ``[..., K]`` and a weight ``[M, K]``: `torch.nn.functional.linear`.

    Large float32 products on CPUs are oneDNN's, outside of autocast; all others PyTorch's.
    """
    return torch.nn.functional.linear(x, weight, bias) if reference_asked() else ops.linear(x, weight, bias)
