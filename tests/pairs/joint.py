"""BAM of other packages. Written for square maps, External-Attention-pytorch's for 7x7."""

import peer_blocks.bam

from tritattn import nn as tn

PAIRS = {
    "blog-BAM": (lambda: peer_blocks.bam.BAM(32), lambda: tn.BAM(32)),
    "blog-ChannelGate": (lambda: peer_blocks.bam.ChannelGate(32, 8), lambda: tn.BAMChannelGate(32, 1 / 8)),
    "blog-SpatialGate": (
        lambda: peer_blocks.bam.SpatialGate(32, 8, dilation_val=2),
        lambda: tn.BAMSpatialGate(32, 1 / 8, dilation=2),
    ),
    "external-BAMBlock": (
        lambda: peer_blocks.bam.BAMBlock(32),
        lambda: tn.BAM(32, num_layers=3, dilated_convs=3, dilation=2, padding=1, combine="sum"),
    ),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()}
SQUARE = ("blog-BAM", "blog-ChannelGate", "external-BAMBlock")
RETURN_GATE = ("blog-ChannelGate", "blog-SpatialGate")
