"""Multi-head self-attention over the positions of a feature map, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention2d import NEED_WEIGHTS, attention2d
from .checks import check_choice, check_feature_map, check_positive, check_weight

__all__ = ["SelfAttention2d"]

if TYPE_CHECKING:
    from typing_extensions import Self


class SelfAttention2d(nn.Module):
    """Multi-head self-attention over the positions of a map (Vaswani et al., 2017; Dosovitskiy et al., 2021).

    ``proj(softmax(q k^T / sqrt(d) + bias) v) [+ x]``, with q, k and v from one linear layer. The bias is learned for
    every offset between two positions, as in Swin (Liu et al., ICCV 2021), if asked for.

    Args:
        channels: C.
        heads: attention heads.
        head_dim: d of each head; None: ``channels // heads``.
        qkv_bias, proj_bias: whether the two linear layers have biases.
        position_bias: ``(H, W)``, the largest map that the relative position bias is for; a smaller one uses the
            middle of the table. None: no such bias, and maps of any size.
        residual: whether x is added.

    Raises:
        ValueError: a non-positive argument; ``channels`` not divisible by ``heads`` without ``head_dim``.

    ``state_dict``: ``qkv.weight`` ``[3 heads d, C]``, rows in the order (q, k, v), head, d, and ``qkv.bias``;
    ``proj.weight`` ``[C, heads d]`` and ``proj.bias``: those of timm's ``Attention``, and in `from_multihead` those of
    `torch.nn.MultiheadAttention`; ``relative_position_bias_table`` ``[(2H - 1)(2W - 1), heads]``, as Swin's.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        position_bias: tuple[int, int] | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_positive("heads", heads)
        if head_dim is None:
            if channels % heads:
                raise ValueError(
                    f"channels must be a multiple of heads={heads} unless head_dim is given, got {channels}"
                )
            head_dim = channels // heads
        check_positive("head_dim", head_dim)
        self.channels, self.heads, self.head_dim = channels, heads, head_dim
        self.position_bias, self.residual = _sizes(position_bias), residual
        self.qkv = nn.Linear(channels, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, channels, bias=proj_bias)
        self.relative_position_bias_table: nn.Parameter | None = None
        if self.position_bias is not None:
            offsets = (2 * self.position_bias[0] - 1) * (2 * self.position_bias[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def table(self) -> Tensor | None:
        """The relative position bias as `attention2d` takes it, ``[2H - 1, 2W - 1, heads]``; a view."""
        if self.relative_position_bias_table is None or self.position_bias is None:
            return None
        return self.relative_position_bias_table.unflatten(0, tuple(2 * size - 1 for size in self.position_bias))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: str = "none") -> Any:
        """Attention of every position over all positions of its image.

        Args:
            x: ``[N, C, H, W]``; a token grid ``[N, H, W, C]`` is ``grid.permute(0, 3, 1, 2)``, and not copied.
            key_mask: bool, ``[N, H, W]``; True: the position is attended to. Each position asks, masked or not; where
                an image has none that is attended to, the attention is zeros.
            need_weights: ``"none"``; ``"mean"``: also ``[N, heads, H, W]``, the mean weight of every position over all
                queries, a heat map without gradients; ``"full"``: also all weights, ``[N, heads, H W, H W]``.

        Returns:
            ``[N, C, H, W]``; with weights, the pair of both.

        Raises:
            TypeError: a dtype that does not fit.
            ValueError: a shape or device that does not fit, an unknown ``need_weights``.
        """
        self.check(x, need_weights)
        grid = x.permute(0, 2, 3, 1)
        out, weights = attention2d(self.project(grid), self.table(), key_mask, need_weights=need_weights)
        y = self.merge(out, grid)
        return y if weights is None else (y, weights)

    def check(self, x: Tensor, need_weights: str) -> None:
        """Raises unless x is a map of C channels on the device of the weights, and ``need_weights`` is known."""
        check_feature_map(x, self.channels)
        check_weight("qkv.weight", self.qkv.weight, (3 * self.heads * self.head_dim, self.channels), x)
        check_choice("need_weights", need_weights, NEED_WEIGHTS)

    def project(self, grid: Tensor) -> Tensor:
        """Queries, keys and values of tokens ``[N, H, W, C]``: ``[N, H, W, 3, heads, d]``."""
        return self.qkv(grid).unflatten(3, (3, self.heads, self.head_dim))

    def merge(self, out: Tensor, grid: Tensor) -> Tensor:
        """What the heads found, ``[N, H, W, heads, d]``, as a map ``[N, C, H, W]``; the tokens are the residual."""
        y = self.proj(out.flatten(3)).to(grid.dtype)
        return (grid + y if self.residual else y).permute(0, 3, 1, 2)

    def attention(self, x: Tensor, key_mask: Tensor | None = None) -> dict[str, Tensor]:
        """``{"received": [N, heads, H, W]}``: the mean weight that each position has in a head; they sum to 1."""
        return {"received": self.forward(x, key_mask, "mean")[1]}

    @classmethod
    def from_timm(cls, attention: nn.Module, **options: Any) -> Self:
        """A module with the weights of timm's ``Attention`` (``timm.layers``, ``timm.models.vision_transformer``).

        Args:
            attention: its weights are copied; dtype, device and mode are kept.
            options: of the constructor: ``residual``. A position bias is drawn anew.

        Raises:
            ValueError: what this module has not: dropout, norms of queries, keys or results, a gate, another width of
                the result.
        """
        _check_timm(attention)
        qkv, proj = attention.get_submodule("qkv"), attention.get_submodule("proj")
        biases = {"qkv_bias": qkv.bias is not None, "proj_bias": proj.bias is not None}
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
        made = cls(qkv.in_features, heads, head_dim, **biases, **options)  # type: ignore[arg-type]
        made.load_state_dict(made.state_dict() | attention.state_dict())
        return made.to(qkv.weight.device, qkv.weight.dtype).train(attention.training)  # type: ignore[arg-type]

    def to_timm(self, attention: nn.Module) -> nn.Module:
        """Copies the weights into a timm ``Attention`` of these sizes, which it returns.

        Raises:
            ValueError: as `from_timm`; or this module has a position bias or a residual, which timm's has not.
            RuntimeError: other sizes.
        """
        _check_timm(attention)
        self._check_plain()
        attention.load_state_dict(self.state_dict())
        return attention

    @classmethod
    def from_multihead(cls, attention: nn.MultiheadAttention, **options: Any) -> Self:
        """A module with the weights of `torch.nn.MultiheadAttention`; arguments as those of `from_timm`.

        Raises:
            ValueError: what this module has not: dropout, other sizes of keys or values, ``bias_k``, ``add_zero_attn``.
        """
        _refuse("attention", {
            "dropout": attention.dropout > 0,
            "kdim or vdim other than embed_dim": attention.in_proj_weight is None,
            "add_bias_kv": attention.bias_k is not None,
            "add_zero_attn": attention.add_zero_attn,
        })  # fmt: skip
        bias = attention.in_proj_bias is not None
        made = cls(attention.embed_dim, attention.num_heads, qkv_bias=bias, proj_bias=bias, **options)
        made.load_state_dict(made.state_dict() | _renamed(attention.state_dict(), _MULTIHEAD))
        weight = attention.in_proj_weight
        return made.to(weight.device, weight.dtype).train(attention.training)

    def to_multihead(self) -> nn.MultiheadAttention:
        """A `torch.nn.MultiheadAttention`, ``batch_first``, with a copy of the weights.

        Raises:
            ValueError: this module has what the other has not: a position bias, a residual, heads that do not share
                the channels, or one bias without the other.
        """
        self._check_plain()
        _refuse("the module", {
            f"head_dim={self.head_dim} other than channels / heads": self.heads * self.head_dim != self.channels,
            "one of two biases": (self.qkv.bias is None) != (self.proj.bias is None),
        })  # fmt: skip
        bias = self.qkv.bias is not None
        made = nn.MultiheadAttention(self.channels, self.heads, bias=bias, batch_first=True)
        made.load_state_dict(_renamed(self.state_dict(), {ours: theirs for theirs, ours in _MULTIHEAD.items()}))
        return made.to(self.qkv.weight.device, self.qkv.weight.dtype).train(self.training)

    def _check_plain(self) -> None:
        _refuse("the module", {"position_bias": self.position_bias is not None, "residual": self.residual})

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, heads={self.heads}, head_dim={self.head_dim}"
        return f"{sizes}, position_bias={self.position_bias}, residual={self.residual}"


_MULTIHEAD = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj.weight": "proj.weight",
    "out_proj.bias": "proj.bias",
}


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor for name, tensor in state.items()}


def _check_timm(attention: nn.Module) -> None:
    """Raises ValueError for what timm's ``Attention`` may have, and ours has not."""
    dropouts, norms = ("attn_drop", "proj_drop"), ("q_norm", "k_norm", "norm")
    found = {name: getattr(getattr(attention, name, None), "p", 0) > 0 for name in dropouts}
    found |= {name: not isinstance(getattr(attention, name, nn.Identity()), nn.Identity) for name in norms}
    proj, qkv = attention.get_submodule("proj"), attention.get_submodule("qkv")
    found |= {"gate": getattr(attention, "gate", None) is not None}
    _refuse("attention", found | {"dim_out other than dim": proj.out_features != qkv.in_features})


def _refuse(what: str, found: dict[str, bool]) -> None:
    """Raises ValueError with the names of everything that was found."""
    names = [name for name, there in found.items() if there]
    if names:
        raise ValueError(f"{what} has no equivalent here: {', '.join(names)}")


def _sizes(position_bias: tuple[int, int] | None) -> tuple[int, int] | None:
    if position_bias is None:
        return None
    if not isinstance(position_bias, (tuple, list)) or len(position_bias) != 2:
        raise ValueError(f"position_bias must be (H, W) or None, got {position_bias!r}")
    for size in position_bias:
        check_positive("position_bias", size)
    height, width = position_bias
    return height, width
