"""The attention blocks as modules: parameters and forward, nothing else."""

from ._attach import attach
from ._registry import available, create, register
from .attention import Attention
from .bam import BAM, BAMChannelGate, BAMSpatialGate
from .cbam import CBAM, ChannelAttention, SpatialAttention
from .coordinate import CoordinateAttention, StripAttention
from .eca import ECA
from .fusion import AFF, IAFF, MSCAM
from .gather_excite import GatherExcite
from .global_context import GlobalContext
from .gsop import GSoP, ISqrtCovPooling
from .scse import ChannelSE, ConcurrentSE, SpatialSE
from .selective_kernel import SelectiveKernel, SelectiveKernelAttention
from .shuffle import ShuffleAttention
from .simam import SimAM
from .split_attention import SplitAttention
from .squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite
from .triplet import TripletAttention

__all__ = [
    "AFF",
    "BAM",
    "CBAM",
    "ECA",
    "IAFF",
    "MSCAM",
    "Attention",
    "BAMChannelGate",
    "BAMSpatialGate",
    "ChannelAttention",
    "ChannelSE",
    "ConcurrentSE",
    "CoordinateAttention",
    "EffectiveSqueezeExcite",
    "GSoP",
    "GatherExcite",
    "GlobalContext",
    "ISqrtCovPooling",
    "SelectiveKernel",
    "SelectiveKernelAttention",
    "ShuffleAttention",
    "SimAM",
    "SpatialAttention",
    "SpatialSE",
    "SplitAttention",
    "SqueezeExcite",
    "StripAttention",
    "TripletAttention",
    "attach",
    "available",
    "create",
    "register",
]
