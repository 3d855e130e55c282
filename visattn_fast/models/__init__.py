"""Small networks that carry the catalogue's gates, for examples, tests and reports."""

from .resnet import AttentionResNet

__all__ = ["AttentionResNet"]
