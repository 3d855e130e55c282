"""The public functions. Each checks its arguments, decides which backend serves, and calls it."""

from .reference.batch_norm import Norm

# isort: split
# Lists of names: written by `make names`.
from .fused.bam import bam
from .fused.cbam import cbam, channel_attention, spatial_attention
from .fused.coord_att import coord_att
from .fused.criss_cross import criss_cross
from .fused.eca import eca
from .fused.gam import channel_mlp, norm_gate
from .fused.gates import conv_maps, gate_channels, gate_twice
from .fused.grn import grn
from .fused.local_attention import local_attention
from .fused.map_attention import map_attention
from .fused.nam import nam
from .fused.scse import scse
from .fused.se import se
from .fused.self_attention import attention2d
from .fused.sequence import additive_score, masked_attention
from .fused.shuffle_attention import shuffle_attention
from .fused.simam import simam
from .fused.sk import sk
from .fused.soca import soca
from .fused.split_attention import split_attention
from .fused.triplet_attention import PlaneGate, triplet_attention
from .fused.window_attention import window_attention

__all__ = [
    "Norm",
    "PlaneGate",
    "additive_score",
    "attention2d",
    "bam",
    "cbam",
    "channel_attention",
    "channel_mlp",
    "conv_maps",
    "coord_att",
    "criss_cross",
    "eca",
    "gate_channels",
    "gate_twice",
    "grn",
    "local_attention",
    "map_attention",
    "masked_attention",
    "nam",
    "norm_gate",
    "scse",
    "se",
    "shuffle_attention",
    "simam",
    "sk",
    "soca",
    "spatial_attention",
    "split_attention",
    "triplet_attention",
    "window_attention",
]
# End of the lists.
