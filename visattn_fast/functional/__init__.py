"""The public functions, one file per family: check, choose a backend, call."""

from ..reference.batch_norm import Norm
from .cbam import cbam, channel_attention, spatial_attention
from .coord_att import coord_att
from .criss_cross import criss_cross
from .eca import eca
from .gam import channel_mlp, norm_gate
from .gates import conv_maps, gate_channels, gate_twice
from .local_attention import local_attention
from .nam import nam
from .scse import scse
from .se import se
from .self_attention import attention2d
from .sequence import additive_score, masked_attention
from .shuffle_attention import shuffle_attention
from .simam import simam
from .sk import sk
from .soca import soca
from .split_attention import split_attention
from .window_attention import window_attention

__all__ = [
    "Norm",
    "additive_score",
    "attention2d",
    "cbam",
    "channel_attention",
    "channel_mlp",
    "conv_maps",
    "coord_att",
    "criss_cross",
    "eca",
    "gate_channels",
    "gate_twice",
    "local_attention",
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
    "window_attention",
]
