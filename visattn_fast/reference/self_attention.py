"""Multi-head self-attention over the positions of a feature map, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .as_built import LINEAR, Layers, has_plain_layers
from .checks import check_choice, check_feature_map, check_floating, check_positive, check_weight
from .masking import masked_softmax

__all__ = ["SelfAttention2d", "attention2d"]

if TYPE_CHECKING:
    from typing_extensions import Self

NEED_WEIGHTS = ("none", "mean", "full")

# Parameters of torch.nn.MultiheadAttention -> parameters of SelfAttention2d.
_MULTIHEAD = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj.weight": "proj.weight",
    "out_proj.bias": "proj.bias",
}


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Expands the table to a bias for every query and key: ``[2H - 1, 2W - 1, heads]`` -> ``[heads, h w, h w]``.

    ``bias[i, j] = table[yi - yj + H - 1, xi - xj + W - 1]``. A map smaller than H x W uses the middle of the table.
    """
    rows, columns, heads = table.shape
    y, x = (torch.arange(size, device=table.device) for size in (height, width))
    dy = (y[:, None] - y + rows // 2)[:, None, :, None]
    dx = (x[:, None] - x + columns // 2)[None, :, None, :]
    return table[dy, dx].reshape(height * width, height * width, heads).permute(2, 0, 1)


def attention2d_weights(
    qkv: Tensor, table: Tensor | None = None, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The weights of `attention2d`, ``softmax(scale q k^T + bias)`` over unmasked keys: ``[N, heads, H W, H W]``."""
    _, height, width, _, _, d = qkv.shape
    q, k, _ = split_heads(qkv, key_mask)
    scores = (q * (d**-0.5 if scale is None else scale)) @ k.mT
    if table is not None:
        scores = scores + relative_bias(table, height, width)
    return masked_softmax(scores, None if key_mask is None else key_mask.flatten(1)[:, None, None])


def attention2d(
    qkv: Tensor,
    table: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    need_weights: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale q k^T + bias) v`` for every head, over the positions of a map.

    Args:
        qkv: queries, keys and values side by side, ``[N, H, W, 3, heads, d]``.
        table: relative position bias, ``[2H' - 1, 2W' - 1, heads]`` with ``H' >= H`` and ``W' >= W``:
            ``bias[i, j] = table[yi - yj + H' - 1, xi - xj + W' - 1]``.
        key_mask: bool, ``[N, H, W]``; True: queries attend to this position. Keys and values elsewhere may hold
            anything, even NaN, without effect on results or gradients. An image without any True gives zeros.
        scale: ``d ** -0.5`` if None.
        need_weights: ``"none"``; ``"mean"``: the mean weight of each position over all queries, a heat map without
            gradients; or ``"full"``: all weights.

    Returns:
        ``[N, H, W, heads, d]``, and None, ``[N, heads, H, W]`` or ``[N, heads, H W, H W]``.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown ``need_weights``.
        TypeError: a dtype that does not fit.
    """
    check_attention2d(qkv, table, key_mask, need_weights)
    weights = attention2d_weights(qkv, table, key_mask, scale)
    out = weights.to(qkv.dtype) @ split_heads(qkv, key_mask)[2]
    out = out.transpose(1, 2).unflatten(1, qkv.shape[1:3])
    if need_weights == "mean":
        return out, weights.detach().mean(2).unflatten(2, qkv.shape[1:3])
    return out, weights if need_weights == "full" else None


def split_heads(qkv: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Splits qkv into q, k and v, ``[N, heads, H W, d]`` each, with zeros in masked keys and values."""
    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)
    if key_mask is not None:
        unseen = ~key_mask.flatten(1)[:, None, :, None]
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    return q, k, v


def check_attention2d(qkv: Tensor, table: Tensor | None, key_mask: Tensor | None, need_weights: str) -> None:
    """Raises unless qkv is ``[N, H, W, 3, heads, d]`` and table and mask fit it."""
    check_choice("need_weights", need_weights, NEED_WEIGHTS)
    check_floating("qkv", qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3 or 0 in qkv.shape[1:]:
        raise ValueError(f"qkv must have shape [N, H, W, 3, heads, d], got {list(qkv.shape)}")
    n, height, width, _, heads, _ = qkv.shape
    if table is not None:
        check_floating("table", table)
        if table.dim() != 3 or table.shape[0] % 2 == 0 or table.shape[1] % 2 == 0:
            raise ValueError(f"table must have shape [2H - 1, 2W - 1, heads], got {list(table.shape)}")
        check_weight("table", table, (*table.shape[:2], heads), qkv)
        if table.shape[0] < 2 * height - 1 or table.shape[1] < 2 * width - 1:
            limits = f"{table.shape[0] // 2 + 1} x {table.shape[1] // 2 + 1}"
            raise ValueError(f"the position bias is for maps of up to {limits} positions, got {height} x {width}")
    if key_mask is not None:
        _check_key_mask(key_mask, (n, height, width), qkv)


def _check_key_mask(key_mask: Tensor, shape: tuple[int, ...], qkv: Tensor) -> None:
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor, True where positions are attended to, got {kind}")
    if tuple(key_mask.shape) != shape:
        raise ValueError(f"key_mask must have shape {list(shape)}, got {list(key_mask.shape)}")
    if key_mask.device != qkv.device:
        raise ValueError(f"key_mask must be on the device of x, {qkv.device}, got {key_mask.device}")


class SelfAttention2d(nn.Module):
    """Multi-head self-attention over the positions of a map (Vaswani et al., 2017; Dosovitskiy et al., 2021).

    ``proj(softmax(q k^T / sqrt(d) + bias) v) [+ x]``; one linear layer makes q, k and v. The optional bias is learned
    for every offset between two positions, as in Swin (Liu et al., ICCV 2021).

    Args:
        channels: C.
        heads: number of attention heads.
        head_dim: d, the width of each head; None: ``channels // heads``.
        qkv_bias, proj_bias: whether the two linear layers have biases.
        position_bias: ``(H, W)``, the largest map that the relative position bias serves; a smaller map uses the
            middle of the table. None: no bias, and maps of any size.
        residual: whether to add x.

    Raises:
        ValueError: a non-positive argument; ``channels`` not divisible by ``heads`` without ``head_dim``.

    ``state_dict``: ``qkv.weight`` ``[3 heads d, C]``, rows in the order (q, k, v), head, d, and ``qkv.bias``;
    ``proj.weight`` ``[C, heads d]`` and ``proj.bias``. timm's ``Attention`` has the same keys; `from_multihead` maps
    the keys of `torch.nn.MultiheadAttention` to them. ``relative_position_bias_table`` ``[(2H - 1)(2W - 1), heads]``
    is Swin's.
    """

    QKV = Layers({"qkv": LINEAR})

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
        self.position_bias, self.residual = _map_size(position_bias), residual
        self.qkv = nn.Linear(channels, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, channels, bias=proj_bias)
        self.relative_position_bias_table: nn.Parameter | None = None
        if self.position_bias is not None:
            offsets = (2 * self.position_bias[0] - 1) * (2 * self.position_bias[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
            nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def table(self) -> Tensor | None:
        """A view of the relative position bias as `attention2d` takes it, ``[2H - 1, 2W - 1, heads]``, or None."""
        if self.relative_position_bias_table is None or self.position_bias is None:
            return None
        sizes = tuple(2 * size - 1 for size in self.position_bias)
        table: Tensor = self.relative_position_bias_table.unflatten(0, sizes)
        return table

    def forward(self, x: Tensor, key_mask: Tensor | None = None, need_weights: str = "none") -> Any:
        """Every position attends to all positions of its image.

        Args:
            x: ``[N, C, H, W]``. ``grid.permute(0, 3, 1, 2)`` passes a token grid ``[N, H, W, C]`` without a copy.
            key_mask: bool, ``[N, H, W]``; True: queries attend to this position. Masked positions still send queries.
                In an image without any True the attention is zeros.
            need_weights: ``"none"``; ``"mean"``: also ``[N, heads, H, W]``, the mean weight of each position over all
                queries, a heat map without gradients; ``"full"``: also all weights, ``[N, heads, H W, H W]``.

        Returns:
            ``[N, C, H, W]``, or the pair of it and the weights.

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
        """Raises unless x is a map of C channels on the device of the weights and ``need_weights`` is known."""
        check_choice("need_weights", need_weights, NEED_WEIGHTS)
        check_feature_map(x)
        if has_plain_layers(self, x, self.QKV):
            check_feature_map(x, self.channels)
            check_weight("qkv.weight", self.qkv.weight, (3 * self.heads * self.head_dim, self.channels), x)

    def project(self, grid: Tensor) -> Tensor:
        """Queries, keys and values of tokens ``[N, H, W, C]``: ``[N, H, W, 3, heads, d]``."""
        qkv: Tensor = self.qkv(grid).unflatten(3, (3, self.heads, self.head_dim))
        return qkv

    def merge(self, out: Tensor, grid: Tensor) -> Tensor:
        """Projects the heads' results ``[N, H, W, heads, d]`` to a map ``[N, C, H, W]``; the residual is ``grid``."""
        y: Tensor = self.proj(out.flatten(3)).to(grid.dtype)
        y = grid + y if self.residual else y
        return y.permute(0, 3, 1, 2)

    def attention(self, x: Tensor, key_mask: Tensor | None = None) -> dict[str, Tensor]:
        """``{"received": [N, heads, H, W]}``: the mean weight of each position; over a map the weights sum to 1."""
        return {"received": self.forward(x, key_mask, "mean")[1]}

    @classmethod
    def from_timm(cls, attention: nn.Module, **options: Any) -> Self:
        """Makes a module with the weights of an ``Attention`` of timm (``timm.layers`` or its vision transformers).

        Args:
            attention: the module to copy weights, dtype, device and mode from.
            options: constructor arguments: ``residual``, ``position_bias``. The bias is initialised anew.

        Raises:
            ValueError: ``attention`` has what this class lacks: dropout, norms of queries, keys or results, a gate, or
                another width of the result.
        """
        _check_timm(attention)
        qkv, proj = attention.get_submodule("qkv"), attention.get_submodule("proj")
        biases = {"qkv_bias": qkv.bias is not None, "proj_bias": proj.bias is not None}
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
        made = cls(qkv.in_features, heads, head_dim, **biases, **options)  # type: ignore[arg-type]
        made.load_state_dict(made.state_dict() | attention.state_dict())
        return made.to(qkv.weight.device, qkv.weight.dtype).train(attention.training)  # type: ignore[arg-type]

    def to_timm(self, attention: nn.Module) -> nn.Module:
        """Copies the weights into a timm ``Attention`` of the same sizes and returns it.

        Raises:
            ValueError: as `from_timm`; or this module has a position bias or a residual, which timm's class lacks.
            RuntimeError: the sizes differ.
        """
        _check_timm(attention)
        self._check_plain()
        attention.load_state_dict(self.state_dict())
        return attention

    @classmethod
    def from_multihead(cls, attention: nn.MultiheadAttention, **options: Any) -> Self:
        """Makes a module with the weights of `torch.nn.MultiheadAttention`; arguments as for `from_timm`.

        Raises:
            ValueError: ``attention`` has what this class lacks: dropout, other sizes of keys or values, ``bias_k``,
                ``add_zero_attn``.
        """
        _refuse(
            "attention",
            {
                "dropout": attention.dropout > 0,
                "kdim or vdim other than embed_dim": attention.in_proj_weight is None,
                "add_bias_kv": attention.bias_k is not None,
                "add_zero_attn": attention.add_zero_attn,
            },
        )
        bias = attention.in_proj_bias is not None
        made = cls(attention.embed_dim, attention.num_heads, qkv_bias=bias, proj_bias=bias, **options)
        made.load_state_dict(made.state_dict() | _renamed(attention.state_dict(), _MULTIHEAD))
        weight = attention.in_proj_weight
        return made.to(weight.device, weight.dtype).train(attention.training)

    def to_multihead(self) -> nn.MultiheadAttention:
        """Makes a `torch.nn.MultiheadAttention`, ``batch_first``, with a copy of the weights.

        Raises:
            ValueError: this module has what that class lacks: a position bias, a residual, a ``head_dim`` other than
                ``channels / heads``, or only one of the two biases.
        """
        self._check_plain()
        _refuse(
            "the module",
            {
                f"head_dim={self.head_dim} other than channels / heads": self.heads * self.head_dim != self.channels,
                "one of two biases": (self.qkv.bias is None) != (self.proj.bias is None),
            },
        )
        bias = self.qkv.bias is not None
        made = nn.MultiheadAttention(self.channels, self.heads, bias=bias, batch_first=True)
        made.load_state_dict(_renamed(self.state_dict(), {ours: theirs for theirs, ours in _MULTIHEAD.items()}))
        return made.to(self.qkv.weight.device, self.qkv.weight.dtype).train(self.training)

    def _check_plain(self) -> None:
        _refuse("the module", {"position_bias": self.position_bias is not None, "residual": self.residual})

    def extra_repr(self) -> str:
        sizes = f"{self.channels}, heads={self.heads}, head_dim={self.head_dim}"
        return f"{sizes}, position_bias={self.position_bias}, residual={self.residual}"


def _renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor for name, tensor in state.items()}


def _check_timm(attention: nn.Module) -> None:
    """Raises ValueError if timm's ``Attention`` uses an option that `SelfAttention2d` lacks."""
    dropouts, norms = ("attn_drop", "proj_drop"), ("q_norm", "k_norm", "norm")
    found = {name: getattr(getattr(attention, name, None), "p", 0) > 0 for name in dropouts}
    found |= {name: not isinstance(getattr(attention, name, nn.Identity()), nn.Identity) for name in norms}
    proj, qkv = attention.get_submodule("proj"), attention.get_submodule("qkv")
    found |= {"gate": getattr(attention, "gate", None) is not None}
    _refuse("attention", found | {"dim_out other than dim": proj.out_features != qkv.in_features})


def _refuse(what: str, found: dict[str, bool]) -> None:
    """Raises ValueError with the names of all options in ``found`` that are True."""
    names = [name for name, there in found.items() if there]
    if names:
        raise ValueError(f"{what} has no equivalent here: {', '.join(names)}")


def _map_size(position_bias: tuple[int, int] | None) -> tuple[int, int] | None:
    if position_bias is None:
        return None
    if not isinstance(position_bias, (tuple, list)) or len(position_bias) != 2:
        raise ValueError(f"position_bias must be (H, W) or None, got {position_bias!r}")
    for size in position_bias:
        check_positive("position_bias", size)
    height, width = position_bias
    return height, width
