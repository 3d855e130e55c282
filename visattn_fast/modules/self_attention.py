"""Self-attention over the positions of a map, without its map of weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import functional, ops, reference
from ..backends import reference_asked


class FastSelfAttention2d(reference.SelfAttention2d):
    """`reference.SelfAttention2d` without the map of weights: same constructor, same ``state_dict``, same result.

    The linear layers are PyTorch's, and hooks on them run.
    """

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: str = "none") -> Any:
        """See `reference.SelfAttention2d.forward`; in x's memory format. See `functional.attention2d`."""
        self.check(x, need_weights)
        grid = x.permute(0, 2, 3, 1) if reference_asked() else ops.token_grid(x)
        out, weights = functional.attention2d(self.project(grid), self.table(), key_mask, need_weights=need_weights)
        y = ops.in_format_of(x, self.merge(out, grid))
        return y if weights is None else (y, weights)
