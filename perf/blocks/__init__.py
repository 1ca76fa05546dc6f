"""The blocks of the harness by name."""

from . import axis, channel, context, covariance, pixel, plane, select, spatial
from .block import NORM, Block, Params, Peer, Weights

__all__ = ["BLOCKS", "NORM", "Block", "Params", "Peer", "Weights"]

BLOCKS: dict[str, Block] = {
    **channel.BLOCKS, **pixel.BLOCKS, **spatial.BLOCKS, **context.BLOCKS,
    **plane.BLOCKS, **covariance.BLOCKS, **select.BLOCKS, **axis.BLOCKS,
}  # fmt: skip
