"""The fused modules: each inherits constructor and parameters from its reference and overrides forward alone."""

from .cbam import FastCBAM, FastChannelAttention, FastSpatialAttention
from .eca import FastECA
from .se import FastSE

__all__ = ["FastCBAM", "FastChannelAttention", "FastECA", "FastSE", "FastSpatialAttention"]
