"""Small networks that carry the catalogue's gates, for examples, tests and reports."""

from .resnet import GATES, AttentionResNet

__all__ = ["GATES", "AttentionResNet"]
