"""VGG-16 with local attention at the end of every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import modules, reference
from ..reference.checks import check_feature_map, check_positive

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions; every block ends in a pool
_REDUCTION = 2 ** len(_BLOCKS)  # factor by which the pools reduce height and width
_GRID = 7
_LAST_WEIGHTS = ("channel_attention.3.weight", "spatial_attention.2.weight")


class VGG16WithAttention(nn.Module):
    """VGG-16 (Simonyan and Zisserman, ICLR 2015) with `LocalAttention` in each of its five blocks.

    The attention stands between the last ReLU and the max pool of a block. Adaptive mean pooling to 7x7 and the usual
    classifier with dropout follow.

    Convolutions and linear layers are initialised after He et al. (ICCV 2015) with zero biases. The last convolution
    of each attention branch has a standard deviation of 0.001, so that every gate starts near 0.5 * 0.5 at all pixels.

    ``state_dict``: ``features.*`` and ``classifier.*`` as in torchvision's ``vgg16``, and `LocalAttention`'s keys under
    ``attentions.0.*`` to ``attentions.4.*``. torchvision's checkpoints load into everything but the attentions::

        weights = torchvision.models.vgg16(weights="DEFAULT").state_dict()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(key.startswith("attentions.") for key in missing)

    Such weights need fine-tuning: they were trained without the gates' scaling.

    Args:
        num_classes: outputs of the classifier.
        dropout: probability of the classifier's dropout.
        fused: True: `FastLocalAttention`; False: `reference.LocalAttention`. The ``state_dict`` keys are the same.

    Raises:
        ValueError: ``num_classes`` is not a positive int, or ``dropout`` is no probability.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, fused: bool = True) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        attention = modules.FastLocalAttention if fused else reference.LocalAttention
        self.features = nn.Sequential()
        self.attentions = nn.ModuleList()
        before = 3
        for channels, convolutions in _BLOCKS:
            for _ in range(convolutions):
                self.features.append(nn.Conv2d(before, channels, 3, padding=1)).append(nn.ReLU(inplace=True))
                before = channels
            self.features.append(nn.MaxPool2d(2, 2))
            self.attentions.append(attention(channels))
        self.avgpool = nn.AdaptiveAvgPool2d(_GRID)
        self.classifier = nn.Sequential(
            nn.Linear(before * _GRID**2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self.apply(_initialise)
        for name, parameter in self.attentions.named_parameters():
            if name.endswith(_LAST_WEIGHTS):
                nn.init.normal_(parameter, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images: ``[N, 3, H, W]``, H and W at least 32 -> logits ``[N, num_classes]``."""
        check_feature_map(x, 3)
        if min(x.shape[2:]) < _REDUCTION:
            raise ValueError(f"x must be at least {_REDUCTION} pixels high and wide, got shape {tuple(x.shape)}")
        attentions = iter(self.attentions)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                x = next(attentions)(x)
            x = layer(x)
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(x), 1))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)
