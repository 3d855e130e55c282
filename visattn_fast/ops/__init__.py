"""One file per op family: schema, reference implementation, fake, autograd.Function."""

from .additive_score import AdditiveScoreFunction, fits_a_block
from .autograd import mixed, recorded, run
from .cbam import CBAMFunction
from .channel_attention import ChannelAttentionFunction
from .channel_mlp import ChannelMLPFunction
from .channel_scale import channel_affine, channel_mean
from .coord_att import CoordAttFunction
from .criss_cross import CrissCrossFunction
from .eca import ECAFunction, eca_normed
from .gates import ChannelScale, Mean, PoolChannels, PoolPixels, TwofoldScale
from .library import register_cuda, register_triton
from .linear import linear
from .local_attention import LocalAttentionFunction
from .map_conv import MapConvFunction
from .nam import NAMFunction
from .norm_gate import NormGateFunction
from .scse import ScSEFunction
from .se import SEFunction, se_mathematics, se_normed
from .self_attention import Attention2dFunction, attention_mean
from .shuffle_attention import ShuffleAttentionFunction
from .simam import SimAMFunction
from .sk import SKFunction
from .soca import SOCAFunction
from .spatial_attention import SpatialAttentionFunction
from .split_attention import SplitAttentionFunction
from .token_grid import in_format_of, token_grid
from .window_attention import WindowAttentionFunction

__all__ = [
    "AdditiveScoreFunction",
    "Attention2dFunction",
    "CBAMFunction",
    "ChannelAttentionFunction",
    "ChannelMLPFunction",
    "ChannelScale",
    "CoordAttFunction",
    "CrissCrossFunction",
    "ECAFunction",
    "LocalAttentionFunction",
    "MapConvFunction",
    "Mean",
    "NAMFunction",
    "NormGateFunction",
    "PoolChannels",
    "PoolPixels",
    "SEFunction",
    "SKFunction",
    "SOCAFunction",
    "ScSEFunction",
    "ShuffleAttentionFunction",
    "SimAMFunction",
    "SpatialAttentionFunction",
    "SplitAttentionFunction",
    "TwofoldScale",
    "WindowAttentionFunction",
    "attention_mean",
    "channel_affine",
    "channel_mean",
    "eca_normed",
    "fits_a_block",
    "in_format_of",
    "linear",
    "mixed",
    "recorded",
    "register_cuda",
    "register_triton",
    "run",
    "se_mathematics",
    "se_normed",
    "token_grid",
]
