"""Linear layers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import reference_asked
from ..ops import linear as op


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of tokens ``[..., K]`` and a weight ``[M, K]``: `torch.nn.functional.linear`.

    Large float32 products on CPUs are oneDNN's, outside of autocast; all others PyTorch's.
    """
    return torch.nn.functional.linear(x, weight, bias) if reference_asked() else op.linear(x, weight, bias)
