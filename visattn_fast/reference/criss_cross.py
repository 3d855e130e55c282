"""Criss-cross attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .as_built import POINTWISE_WITH_BIAS, Layers, has_plain_layers
from .checks import check_feature_map, check_weight, hidden_width
from .parameter_access import child, parameter, weight_and_bias

__all__ = ["CrissCross", "criss_cross"]


def cross_weights(q: Tensor, k: Tensor) -> Tensor:
    """Weights of every position over its column without itself, then over its row: ``[N, H, W, H + W]``.

    Args:
        q, k: ``[N, c, H, W]``.
    """
    itself = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)[None, :, None]  # [1, H, 1, H]
    column = torch.einsum("nchw,ncjw->nhwj", q, k).masked_fill(itself, -torch.inf)
    row = torch.einsum("nchw,nchj->nhwj", q, k)
    return torch.cat([column, row], 3).softmax(3)


def criss_cross(
    x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor, wv: Tensor, bv: Tensor, gamma: Tensor
) -> Tensor:
    """``gamma * out + x``, where out is the unscaled attention of every position over its row and column.

    Args:
        x: ``[N, C, H, W]``.
        wq, bq, wk, bk: projections to queries and keys, ``[R, C, 1, 1]`` and ``[R]``.
        wv, bv: projection to values, ``[C, C, 1, 1]`` and ``[C]``.
        gamma: ``[1]``.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    check_criss_cross(x, wq, bq, wk, bk, wv, bv, gamma)
    return _attended(x, _project(x, wq, bq), _project(x, wk, bk), _project(x, wv, bv), gamma)


def _attended(x: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    column, row = cross_weights(q, k).to(v.dtype).split([x.shape[2], x.shape[3]], 3)
    out = torch.einsum("nhwj,ncjw->nchw", column, v) + torch.einsum("nhwj,nchj->nchw", row, v)
    return gamma * out + x


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight.flatten(1)[:, :, None, None], bias)


def check_criss_cross(
    x: Tensor, wq: Tensor, bq: Tensor, wk: Tensor, bk: Tensor, wv: Tensor, bv: Tensor, gamma: Tensor
) -> None:
    """Raises unless x is a feature map and the other arguments of `criss_cross` fit it."""
    if wv.dim() < 2 or wq.dim() < 2:
        raise ValueError(f"weights must have shape [R, C] or [R, C, 1, 1], got {list(wq.shape)} and {list(wv.shape)}")
    hidden, channels = wq.shape[0], wv.shape[1]
    check_feature_map(x, channels)
    check_weight("wq", wq, (hidden, channels), x)
    check_weight("wk", wk, (hidden, channels), x)
    check_weight("wv", wv, (channels, channels), x)
    for name, t, size in (("bq", bq, hidden), ("bk", bk, hidden), ("bv", bv, channels), ("gamma", gamma, 1)):
        check_weight(name, t, (size,), x)


class CrissCross(nn.Module):
    """Criss-cross attention (Huang et al., "CCNet: Criss-cross attention for semantic segmentation", ICCV 2019).

    ``y = gamma * out + x``. At every position, out is the sum of the values in its row and column (H + W - 1
    positions, itself once), weighted by ``softmax(q k)`` without a scale. 1x1 convolutions make queries and keys with
    ``channels // reduction`` channels and values with ``channels``; gamma starts at zero. The published code needs a
    CUDA device; this code does not.

    Args:
        channels: C.
        reduction: queries and keys have ``channels // reduction`` channels.

    Raises:
        ValueError: a non-positive argument, or fewer channels than ``reduction``.

    ``state_dict``: ``query_conv``, ``key_conv`` and ``value_conv``, each with ``weight`` and ``bias``; ``gamma``
    ``[1]``.
    """

    LAYERS = Layers(
        {"query_conv": POINTWISE_WITH_BIAS, "key_conv": POINTWISE_WITH_BIAS, "value_conv": POINTWISE_WITH_BIAS}
    )

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction)
        self.query_conv = nn.Conv2d(channels, hidden, 1)
        self.key_conv = nn.Conv2d(channels, hidden, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def weights(self) -> tuple[Tensor, ...]:
        """``(wq, bq, wk, bk, wv, bv, gamma)``, as `criss_cross` takes them."""
        query, key, value = (weight_and_bias(child(self, f"{name}_conv")) for name in ("query", "key", "value"))
        return *query, *key, *value, parameter(self, "gamma")

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        self.check(x)
        return _attended(x, self.query_conv(x), self.key_conv(x), self.value_conv(x), self.gamma)

    def check(self, x: Tensor) -> None:
        """Raises unless x fits the layers."""
        if has_plain_layers(self, x, self.LAYERS):
            check_criss_cross(x, *self.weights())
        else:
            check_feature_map(x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """``{"received": [N, 1, H, W]}``: the mean weight of a position for the others in its row and column.

        Works row by row, without a map ``[N, H, W, H + W]``.
        """
        self.check(x)
        q, k = self.query_conv(x), self.key_conv(x)
        (n, _, height, width), others = x.shape, max(x.shape[2] + x.shape[3] - 2, 1)
        received, rows = q.new_zeros((n, height, width)), []
        for h in range(height):
            column = torch.einsum("ncw,ncjw->nwj", q[:, :, h], k)
            column[:, :, h] = -torch.inf
            row = torch.einsum("ncw,ncj->nwj", q[:, :, h], k[:, :, h])
            weights = torch.cat([column, row], 2).softmax(2)
            received = received + weights[:, :, :height].transpose(1, 2)
            row = weights[:, :, height:]
            rows.append(row.sum(1) - row.diagonal(dim1=1, dim2=2))
        return {"received": ((received + torch.stack(rows, 1)) / others)[:, None]}
