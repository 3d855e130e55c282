"""The catalogue in plain PyTorch: specification of the fused modules and oracle of their tests. Needs torch alone."""

from .cbam import CBAM, ChannelAttention, SpatialAttention, cbam, channel_attention, spatial_attention
from .eca import ECA, eca
from .epilogue import epilogue
from .se import SE, se

__all__ = [
    "CBAM",
    "ECA",
    "SE",
    "ChannelAttention",
    "SpatialAttention",
    "cbam",
    "channel_attention",
    "eca",
    "epilogue",
    "se",
    "spatial_attention",
]
