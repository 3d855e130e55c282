"""The fused modules: each inherits constructor and parameters from its reference and overrides forward alone."""

from .cbam import FastCBAM, FastChannelAttention, FastSpatialAttention
from .coord_att import FastCoordAtt
from .criss_cross import FastCrissCross
from .eca import FastECA
from .gam import FastGAM
from .local_attention import FastLocalAttention
from .nam import FastNAM
from .scse import FastscSE
from .se import FastSE
from .self_attention import FastSelfAttention2d
from .sequence import FastAttentionLayer, FastAttentionPooling, FastSequenceAttention
from .shuffle_attention import FastShuffleAttention
from .simam import FastSimAM
from .sk import FastSK
from .soca import FastSOCA
from .split_attention import FastS2MLPv2
from .window_attention import FastWindowAttention2d

__all__ = [
    "FastAttentionLayer",
    "FastAttentionPooling",
    "FastCBAM",
    "FastChannelAttention",
    "FastCoordAtt",
    "FastCrissCross",
    "FastECA",
    "FastGAM",
    "FastLocalAttention",
    "FastNAM",
    "FastS2MLPv2",
    "FastSE",
    "FastSK",
    "FastSOCA",
    "FastSelfAttention2d",
    "FastSequenceAttention",
    "FastShuffleAttention",
    "FastSimAM",
    "FastSpatialAttention",
    "FastWindowAttention2d",
    "FastscSE",
]
