"""Fused attention for vision models: drop-in modules with the same parameters and the same numbers, sooner."""

from . import functional, reference
from .backends import Backend, Decision, backends, use_backend
from .explain import explain
from .integrations import Acceleration, accelerate, restore
from .watch import GateStatistics, attention_maps, watch_gates

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
    "Acceleration",
    "Backend",
    "Decision",
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
    "GateStatistics",
    "accelerate",
    "attention_maps",
    "backends",
    "explain",
    "functional",
    "reference",
    "restore",
    "use_backend",
    "watch_gates",
]
# End of the lists.

__version__ = "0.1.0"
