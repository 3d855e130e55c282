"""The fused modules: each inherits constructor and parameters from its reference and overrides forward alone."""

# isort: split
# Lists of names: written by `make names`.
from .fused.bam import FastBAM
from .fused.cbam import FastCBAM, FastChannelAttention, FastSpatialAttention
from .fused.coord_att import FastCoordAtt
from .fused.criss_cross import FastCrissCross
from .fused.eca import FastECA
from .fused.gam import FastGAM
from .fused.grn import FastGRN
from .fused.local_attention import FastLocalAttention
from .fused.map_attention import FastMapAttention2d
from .fused.nam import FastNAM
from .fused.scse import FastscSE
from .fused.se import FastSE
from .fused.self_attention import FastSelfAttention2d
from .fused.sequence import FastAttentionLayer, FastAttentionPooling, FastSequenceAttention
from .fused.shuffle_attention import FastShuffleAttention
from .fused.simam import FastSimAM
from .fused.sk import FastSK
from .fused.soca import FastSOCA
from .fused.split_attention import FastS2MLPv2
from .fused.triplet_attention import FastTripletAttention
from .fused.window_attention import FastWindowAttention2d

__all__ = [
    "FastAttentionLayer",
    "FastAttentionPooling",
    "FastBAM",
    "FastCBAM",
    "FastChannelAttention",
    "FastCoordAtt",
    "FastCrissCross",
    "FastECA",
    "FastGAM",
    "FastGRN",
    "FastLocalAttention",
    "FastMapAttention2d",
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
    "FastTripletAttention",
    "FastWindowAttention2d",
    "FastscSE",
]
# End of the lists.
