"""Fused selective kernels."""

from __future__ import annotations

from torch import Tensor

from .. import functional, reference


class FastSK(reference.SK):
    """`reference.SK`, fused: same constructor, same ``state_dict``, same result.

    The convolutions and their batch norms are PyTorch's, and hooks on them run; hooks on the other inner layers do
    not: the fused op reads their parameters alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C, H, W]``; see `functional.sk`."""
        return functional.sk(*self.branches(x), *self.weights(), **self.norm_step()).to(x.dtype)
