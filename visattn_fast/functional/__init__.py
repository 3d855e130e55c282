"""The public functions, one file per family: check, choose a backend, call."""

from .cbam import cbam, channel_attention, spatial_attention
from .eca import eca
from .se import se

__all__ = ["cbam", "channel_attention", "eca", "se", "spatial_attention"]
