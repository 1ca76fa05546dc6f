"""The blocks of the harness by name."""

from . import axis, channel, context, covariance, fusion, joint, local, pixel, plane, select, spatial
from .block import NORM, Block, Params, Peer, Weights

__all__ = ["BLOCKS", "NORM", "Block", "Params", "Peer", "Weights"]

FAMILIES = (channel, pixel, spatial, context, plane, covariance, select, axis, local, joint, fusion)
BLOCKS: dict[str, Block] = {name: block for family in FAMILIES for name, block in family.BLOCKS.items()}
