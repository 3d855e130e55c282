"""Shuffle attention in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .as_built import Layers, Settings, has_plain_layers, layer
from .checks import check_feature_map, check_positive, check_positive_number, check_weight

__all__ = ["ShuffleAttention", "shuffle_attention"]


def check_shuffle_attention(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> int:
    """Returns the number of groups. Raises unless the six weights have K elements and x a multiple of 2 K channels."""
    check_feature_map(x)
    check_positive_number("eps", eps)
    cweight = weights[0]
    width = cweight.numel() if isinstance(cweight, Tensor) else 0
    names = ("cweight", "cbias", "sweight", "sbias", "gn_weight", "gn_bias")
    for name, weight in zip(names, weights, strict=True):
        flat = weight.flatten() if isinstance(weight, Tensor) else weight
        check_weight(name, flat, (width,), x)
    if not width or x.shape[1] % (2 * width):
        raise ValueError(f"x must have a multiple of {2 * width} channels, as the weights have, got {tuple(x.shape)}")
    return x.shape[1] // (2 * width)


def shuffle(x: Tensor) -> Tensor:
    """Shuffles channels in two groups: channel ``h C / 2 + j`` becomes channel ``2 j + h``."""
    n, c, h, w = x.shape
    return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _gated_and_gate(
    x: Tensor, weights: tuple[Tensor, ...], norm: Callable[[Tensor], Tensor], need_gate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The result of `shuffle_attention`, and the gate of every element of it, ``[N, C, H, W]``, or None.

    Args:
        x: ``[N, C, H, W]``.
        weights: cweight, cbias, sweight and sbias.
        norm: the group norm, of ``[N G, K, H, W]``.
        need_gate: whether to compute the gate of every element.
    """
    n, c, h, w = x.shape
    width = weights[0].numel()
    groups = c // (2 * width)
    cweight, cbias, sweight, sbias = (t.reshape(1, width, 1, 1) for t in weights)
    x0, x1 = x.reshape(n * groups, 2 * width, h, w).chunk(2, dim=1)
    gate0 = torch.sigmoid(cweight * x0.mean((2, 3), keepdim=True) + cbias)
    gate1 = torch.sigmoid(sweight * norm(x1) + sbias)
    y = shuffle(torch.cat([x0 * gate0, x1 * gate1], 1).reshape(n, c, h, w))
    gate = shuffle(torch.cat([gate0.expand_as(x0), gate1], 1).reshape(n, c, h, w)) if need_gate else None
    return y, gate


def _normed(x1: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The group norm of shuffle attention: one group for each channel."""
    width = x1.shape[1]
    if x1.shape[2] * x1.shape[3] == 1:  # the variance is 0, and F.group_norm refuses a single value
        normed = (x1 - x1) + bias.reshape(1, width, 1, 1)
        return normed + 0 * weight.reshape(1, width, 1, 1)
    return F.group_norm(x1, width, weight.flatten(), bias.flatten(), eps)


def shuffle_attention(
    x: Tensor,
    cweight: Tensor,
    cbias: Tensor,
    sweight: Tensor,
    sbias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Splits each of G channel groups into halves x0 and x1, gates x0 by channel and x1 by element, and shuffles.

    ``x0 * sigmoid(cweight mean(x0) + cbias)`` and ``x1 * sigmoid(sweight gn(x1) + sbias)``. Mean and group norm are
    over H and W; the group norm has one group for each channel and the biased variance, 0 for 1x1 maps. Channel
    ``h C / 2 + j`` of the result becomes channel ``2 j + h``.

    Args:
        x: ``[N, C, H, W]``.
        cweight, cbias, sweight, sbias, gn_weight, gn_bias: K elements each, shared by the ``G = C / 2K`` groups.
        eps: added to the variance of the group norm.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a dtype that is not floating-point.
    """
    weights = cweight, cbias, sweight, sbias
    check_shuffle_attention(x, (*weights, gn_weight, gn_bias), eps)
    return _gated_and_gate(x, weights, lambda x1: _normed(x1, gn_weight, gn_bias, eps))[0]


def _norms_each_channel(d: Settings) -> bool:
    own = d["_parameters"]
    affine = own.get("weight") is not None and own.get("bias") is not None
    return affine and d["num_groups"] == d["num_channels"]


class ShuffleAttention(nn.Module):
    """Shuffle attention (Zhang and Yang, "SA-Net", ICASSP 2021): see `shuffle_attention`.

    Args:
        channels: C, a multiple of twice ``groups``.
        groups: G; all groups share the parameters.

    Raises:
        ValueError: a non-positive argument, channels that ``2 * groups`` does not divide.

    ``state_dict``: ``cweight``, ``cbias``, ``sweight``, ``sbias`` ``[1, C / 2G, 1, 1]``, ``gn.weight`` and ``gn.bias``
    ``[C / 2G]``.
    """

    LAYERS = Layers({"gn": layer(nn.GroupNorm, fits=_norms_each_channel, words="affine, with one group per channel")})

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("groups", groups)
        if channels % (2 * groups):
            raise ValueError(f"channels must be a multiple of 2 * groups = {2 * groups}, got {channels}")
        self.channels, self.groups = channels, groups
        shape = (1, channels // (2 * groups), 1, 1)
        self.cweight, self.cbias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(shape))
        self.sweight, self.sbias = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(shape))
        self.gn = nn.GroupNorm(shape[1], shape[1])

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(cweight, ..., gn_bias)``, as `shuffle_attention` takes them."""
        return self.cweight, self.cbias, self.sweight, self.sbias, self.gn.weight, self.gn.bias

    def forward(self, x: Tensor) -> Tensor:
        """Applies the attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return self._run(x)[0]

    def _run(self, x: Tensor, need_gate: bool = False) -> tuple[Tensor, Tensor | None]:
        plain = has_plain_layers(self, x, self.LAYERS)
        if plain:
            check_feature_map(x, self.channels)
            check_shuffle_attention(x, self.weights(), self.gn.eps)
        else:
            check_feature_map(x)

        def norm(x1: Tensor) -> Tensor:
            if plain and x1.shape[2] * x1.shape[3] == 1:
                return _normed(x1, self.gn.weight, self.gn.bias, self.gn.eps)
            normed: Tensor = self.gn(x1)
            return normed

        return _gated_and_gate(x, (self.cweight, self.cbias, self.sweight, self.sbias), norm, need_gate)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """The gate of every element, in the order of the result's channels: ``{"element": [N, C, H, W]}``."""
        gate = self._run(x, need_gate=True)[1]
        assert gate is not None
        return {"element": gate}

    def extra_repr(self) -> str:
        return f"channels={self.channels}, groups={self.groups}"
