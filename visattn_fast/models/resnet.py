"""A small residual network with a gate at the end of every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..catalogue import ENTRIES
from ..reference.as_built import Layer, Layers, as_built
from ..reference.checks import check_feature_map, check_positive

# CBAM's halves return gates without applying them, and self-attention over a whole large map is no gate for a block.
_NOT_FOR_BLOCKS = ("channel_attention", "spatial_attention", "self_attention")
# Entries in eval mode repeat a module.
GATES = tuple(name for name, entry in ENTRIES.items() if entry.training and name not in _NOT_FOR_BLOCKS)


class AttentionBlock(nn.Module):
    """``relu(gate(bn2(conv2(relu(bn1(conv1(x)))))) + shortcut(x))`` with two 3x3 convolutions.

    The gate stands after the last batch norm and before the addition, as in SE-ResNet (Hu et al., CVPR 2018) and
    CBAM-ResNet (Woo et al., ECCV 2018). The shortcut is the identity if the shape stays the same, else a 1x1
    convolution and a batch norm.

    Args:
        in_channels, channels: C of input and output.
        stride: stride of the first convolution and of the shortcut.
        attention, fused: as in `AttentionResNet`.
    """

    # Fused gates that take the addition and the ReLU. Any other gate is called, and then both follow.
    LAYERS = Layers(
        {
            "gate": Layer(
                frozenset(entry.fast for entry in ENTRIES.values() if entry.epilogue),
                children=None,
                noun="a fused gate with an epilogue",
            )
        }
    )

    def __init__(self, in_channels: int, channels: int, stride: int, attention: str | None, fused: bool) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _convolution(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.gate = _gate(attention, channels, fused)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(_convolution(in_channels, channels, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(channels))
        self.epilogue = fused and attention is not None and ENTRIES[attention].epilogue

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block: ``[N, in_channels, H, W]`` -> ``[N, channels, ceil(H/stride), ceil(W/stride)]``."""
        shortcut = self.shortcut(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.epilogue and as_built(self, x, AttentionBlock.LAYERS):
            y: Tensor = self.gate(out, residual=shortcut, activation="relu")
            return y
        return reference.epilogue(self.gate(out), shortcut, "relu")


class AttentionResNet(nn.Module):
    """A residual network whose basic blocks end in a gate.

    A 3x3 convolution with batch norm and ReLU, then one stage of `AttentionBlock` for each entry of ``depths``, then
    the mean over H and W and a linear layer. Stage i has ``width * 2**i`` channels; every stage but the first halves H
    and W. Convolutions are initialised after He et al. (ICCV 2015), batch norms to 1 and 0; gates initialise
    themselves.

    Args:
        attention: the name of a gate, one of `GATES`: ``"se"``, ``"eca"``, ``"cbam"`` ...; None: no gate.
        num_classes: outputs of the linear layer.
        width: channels of the first stage.
        depths: blocks in each stage.
        in_channels: channels of the images.
        fused: True: fused modules, which add the shortcut and apply ReLU in their epilogue if they have one. False:
            reference modules, with addition and ReLU as separate steps. The ``state_dict`` keys are the same.

    Raises:
        ValueError: an unknown ``attention``, a size that is not a positive int, empty ``depths``.
    """

    def __init__(
        self,
        attention: str | None = "cbam",
        num_classes: int = 10,
        width: int = 16,
        depths: Sequence[int] = (1, 1, 1),
        in_channels: int = 3,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if attention is not None and attention not in GATES:
            raise ValueError(f"attention must be None or one of {', '.join(map(repr, GATES))}, got {attention!r}")
        for name, value in (("num_classes", num_classes), ("width", width), ("in_channels", in_channels)):
            check_positive(name, value)
        if not depths:
            raise ValueError("depths must name at least one stage, got none")
        for depth in depths:
            check_positive("every entry of depths", depth)

        self.in_channels = in_channels
        self.stem = nn.Sequential(_convolution(in_channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential()
        channels = width
        for index, depth in enumerate(depths):
            stage = nn.Sequential()
            for block in range(depth):
                before, channels = channels, width * 2**index
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(AttentionBlock(before, channels, stride, attention, fused))
            self.stages.append(stage)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``."""
        check_feature_map(x, self.in_channels)
        logits: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return logits


def _gate(attention: str | None, channels: int, fused: bool) -> nn.Module:
    if attention is None:
        return nn.Identity()
    entry = ENTRIES[attention]
    return (entry.fast if fused else entry.reference)(**entry.arguments(channels))


def _convolution(in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
