"""Networks with the catalogue's gates, for examples, tests and reports."""

from .resnet import GATES, AttentionResNet
from .vgg import VGG16WithAttention

__all__ = ["GATES", "AttentionResNet", "VGG16WithAttention"]
