"""timm's attention modules, and the residual blocks that end in one. Source: timm 1.0 (Apache-2.0)."""

from __future__ import annotations

from typing import Any

from timm.layers import EcaModule, SEModule
from timm.layers.activations import HardSwish, Sigmoid
from timm.layers.coord_attn import CoordAttn
from timm.models import resnet, swin_transformer
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from .. import functional
from ..reference.batch_norm import batch_norm_step
from .recipe import Recipe, all_of, fingerprint, is_swapped, layers, own_class
from .se_like import se_layers, se_like


class FastSEModule(SEModule):
    """timm's SEModule, fused; with the epilogue of the block around it, if asked."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return se_like(x, self.fc1, self.act, self.fc2, self.gate, residual, activation)


class FastSqueezeExcite(SqueezeExcite):
    """The SqueezeExcite of timm's EfficientNets and MobileNets, fused."""

    def forward(self, x: Tensor) -> Tensor:
        return se_like(x, self.conv_reduce, self.act1, self.conv_expand, self.gate)


class FastEcaModule(EcaModule):
    """timm's EcaModule, fused; with the epilogue of the block around it, if asked."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        return functional.eca(x, self.conv.weight, residual=residual, activation=activation)


class FastCoordAttn(CoordAttn):
    """timm's CoordAttn, fused."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        conv1, bn, height, width = module.conv1, module.bn1, module.conv_h, module.conv_w
        training, momentum = batch_norm_step(bn)
        return functional.coord_att(
            x, conv1.weight, conv1.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var,
            height.weight, height.bias, width.weight, width.bias,
            training=training, momentum=momentum, eps=bn.eps, residual=x if module.has_skip else None,
        )  # fmt: skip


class FastBasicBlock(resnet.BasicBlock):
    """timm's BasicBlock, whose gate adds the shortcut and activates."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        out = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        return _finish(block, block.bn2(block.conv2(out)), x, block.act2)


class FastBottleneck(resnet.Bottleneck):
    """timm's Bottleneck, whose gate adds the shortcut and activates."""

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self
        out = block.act1(block.bn1(block.conv1(x)))
        out = block.aa(block.act2(block.drop_block(block.bn2(block.conv2(out)))))
        return _finish(block, block.bn3(block.conv3(out)), x, block.act3)


class FastSwinTransformerBlock(swin_transformer.SwinTransformerBlock):
    """timm's SwinTransformerBlock, whose windows are read where they lie."""

    def _attn(self, x: Tensor) -> Tensor:
        block: Any = self
        attn, sizes = block.attn, zip(block.window_size, x.shape[1:3], block.input_resolution, strict=True)
        if not block.dynamic_mask and any(-(-here // w) != -(-known // w) for w, here, known in sizes):
            return super()._attn(x)  # its mask is of another map
        out = functional.window_attention(
            attn.qkv(x), attn.qkv.bias, attn.relative_position_bias_table, attn.num_heads, block.window_size,
            block.shift_size, attn.scale, pad_first=False,
        )  # fmt: skip
        return attn.proj(out)


_EPILOGUES = {nn.ReLU: "relu", nn.SiLU: "silu"}
# What the classes above repeat; another version's is left alone.
_KNOWN_SWIN = "d74a720dec74c492"
_KNOWN_FORWARDS = {"BasicBlock": "71ec36ab9b7237a2", "Bottleneck": "6d62f9e26235e2c6"}


def _finish(block: Any, out: Tensor, shortcut: Tensor, activation: nn.Module) -> Tensor:
    if block.downsample is not None:
        shortcut = block.downsample(shortcut)
    return block.se(out, residual=shortcut, activation=_EPILOGUES[type(activation)])


def _against_se(module: Any) -> str:
    if module.add_maxpool:
        return "add_maxpool: it pools the maximum, too"
    return "" if type(module.bn) is nn.Identity else "a norm layer stands inside"


def _against_eca(module: Any) -> str:
    if module.conv2 is not None:
        return "use_mlp: it has two convolutions"
    return layers({"gate": _SIGMOIDS})(module)


def _against_block(block: Any) -> str:
    kind, last = own_class(block), block.act3 if isinstance(block, resnet.Bottleneck) else block.act2
    if not (block.se is not None and is_swapped(block.se) and isinstance(block.se, (FastSEModule, FastEcaModule))):
        return "its gate is not a swapped SEModule or EcaModule"
    if block.drop_path is not None:
        return "drop_path stands between the gate and the addition"
    if type(last) not in _EPILOGUES:
        return f"its last activation is {type(last).__name__}, not ReLU or SiLU"
    known = fingerprint(kind.forward) == _KNOWN_FORWARDS[kind.__name__]
    return "" if known else f"this version's {kind.__name__}.forward is not the one that is known"


def _against_swin(block: Any) -> str:
    if block.attn.attn_drop.p or block.attn.proj_drop.p:
        return "attn_drop or proj_drop: which values are dropped would change"
    swin, attention = swin_transformer, swin_transformer.WindowAttention
    found = fingerprint(
        swin.SwinTransformerBlock._attn, swin.SwinTransformerBlock.get_attn_mask, attention.forward,
        attention._get_rel_pos_bias, swin.window_partition, swin.window_reverse, swin.get_relative_position_index,
    )  # fmt: skip
    return "" if found == _KNOWN_SWIN else "this version's window attention is not the one that is known"


_SIGMOIDS = (nn.Sigmoid, Sigmoid)
_COORDINATES = layers({"bn1": (nn.BatchNorm2d,), "act": (nn.Hardswish, HardSwish), "gate": _SIGMOIDS})

_SWIN = layers({"attn": (swin_transformer.WindowAttention,), "attn.qkv": (nn.Linear,), "attn.proj": (nn.Linear,)})

RECIPES = [
    Recipe(SEModule, FastSEModule, "se", se_layers("fc1", "act", "fc2", "gate", Sigmoid, more=_against_se)),
    Recipe(SqueezeExcite, FastSqueezeExcite, "se", se_layers("conv_reduce", "act1", "conv_expand", "gate", Sigmoid)),
    Recipe(EcaModule, FastEcaModule, "eca", _against_eca),
    Recipe(CoordAttn, FastCoordAttn, "coord_att", _COORDINATES),
    Recipe(
        swin_transformer.SwinTransformerBlock,
        FastSwinTransformerBlock,
        "window_attention",
        all_of(_SWIN, _against_swin),
    ),
    Recipe(resnet.BasicBlock, FastBasicBlock, "epilogue", _against_block, pattern=True),
    Recipe(resnet.Bottleneck, FastBottleneck, "epilogue", _against_block, pattern=True),
]
