"""Functional forms of the attention blocks, and the primitives that they are made of.

Blocks: se, ese, eca, cse, sse, scse, channel_attention, spatial_attention, cbam, gc, ge, gsop, shuffle, simam, sk, splat, coord, strip, triplet,
bam, mscam, aff, iaff. Primitives: channel_statistics, spatial_statistics, covariance, gate, blend.
"""

import torch.fx

from .axis import coord, strip, triplet
from .channel import channel_attention, channel_statistics, cse, eca, ese, se
from .context import gc
from .covariance import covariance, gsop
from .fusion import aff, blend, iaff, mscam
from .gate import gate
from .joint import bam
from .local import ge
from .pixel import scse, sse
from .plane import shuffle, simam
from .select import sk, splat
from .spatial import cbam, spatial_attention, spatial_statistics

__all__ = [
    "aff",
    "bam",
    "blend",
    "cbam",
    "channel_attention",
    "channel_statistics",
    "coord",
    "covariance",
    "cse",
    "eca",
    "ese",
    "gate",
    "gc",
    "ge",
    "gsop",
    "iaff",
    "mscam",
    "scse",
    "se",
    "shuffle",
    "simam",
    "sk",
    "spatial_attention",
    "spatial_statistics",
    "splat",
    "sse",
    "strip",
    "triplet",
]

# A node of their own each in what torch.fx.symbolic_trace makes: its stand-ins for tensors have no shapes to check.
for _name in __all__:
    torch.fx.wrap(_name)
