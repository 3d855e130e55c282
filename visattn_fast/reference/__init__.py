"""The catalogue in plain PyTorch: the specification of the fused modules and the oracle of their tests.

It imports only torch.
"""

# isort: split
# Lists of names: written by `make names`.
from .bam import BAM, bam
from .cbam import CBAM, ChannelAttention, SpatialAttention, cbam, channel_attention, spatial_attention
from .coord_att import CoordAtt, coord_att
from .criss_cross import CrissCross, criss_cross
from .custom_gates import gate_channels, gate_twice
from .eca import ECA, eca
from .epilogue import epilogue
from .gam import GAM, channel_mlp, norm_gate
from .grn import GRN, grn
from .local_attention import LocalAttention, local_attention
from .map_attention import MapAttention2d, map_attention
from .masking import masked_softmax
from .nam import NAM, nam
from .scse import scSE, scse
from .se import SE, se
from .self_attention import SelfAttention2d, attention2d
from .sequence import AttentionLayer, AttentionPooling, SequenceAttention, additive_score
from .shuffle_attention import ShuffleAttention, shuffle_attention
from .simam import SimAM, simam
from .sk import SK, sk
from .soca import SOCA, soca
from .split_attention import S2MLPv2, split_attention
from .triplet_attention import TripletAttention, triplet_attention
from .window_attention import WindowAttention2d, window_attention

__all__ = [
    "BAM",
    "CBAM",
    "ECA",
    "GAM",
    "GRN",
    "NAM",
    "SE",
    "SK",
    "SOCA",
    "AttentionLayer",
    "AttentionPooling",
    "ChannelAttention",
    "CoordAtt",
    "CrissCross",
    "LocalAttention",
    "MapAttention2d",
    "S2MLPv2",
    "SelfAttention2d",
    "SequenceAttention",
    "ShuffleAttention",
    "SimAM",
    "SpatialAttention",
    "TripletAttention",
    "WindowAttention2d",
    "additive_score",
    "attention2d",
    "bam",
    "cbam",
    "channel_attention",
    "channel_mlp",
    "coord_att",
    "criss_cross",
    "eca",
    "epilogue",
    "gate_channels",
    "gate_twice",
    "grn",
    "local_attention",
    "map_attention",
    "masked_softmax",
    "nam",
    "norm_gate",
    "scSE",
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
