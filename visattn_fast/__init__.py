"""Fused attention for vision models: drop-in modules with the same parameters and the same numbers, sooner."""

from . import functional, reference
from .backends import Backend, backends, use_backend
from .integrations import Acceleration, accelerate, restore
from .modules import (
    FastAttentionLayer,
    FastAttentionPooling,
    FastCBAM,
    FastChannelAttention,
    FastCoordAtt,
    FastCrissCross,
    FastECA,
    FastGAM,
    FastLocalAttention,
    FastNAM,
    FastS2MLPv2,
    FastscSE,
    FastSE,
    FastSelfAttention2d,
    FastSequenceAttention,
    FastShuffleAttention,
    FastSimAM,
    FastSK,
    FastSOCA,
    FastSpatialAttention,
    FastWindowAttention2d,
)
from .watch import GateStatistics, attention_maps, watch_gates

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "Backend",
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
    "GateStatistics",
    "accelerate",
    "attention_maps",
    "backends",
    "functional",
    "reference",
    "restore",
    "use_backend",
    "watch_gates",
]
