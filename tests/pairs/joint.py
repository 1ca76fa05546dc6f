"""BAM of other packages. Written for square maps, External-Attention-pytorch's for 7x7."""

import peer_blocks.bam
import torch

from tritattn import nn as tn


class BAM(peer_blocks.bam.BAM):
    """By the paper's formula."""

    def forward(self, x):
        return (1 + torch.sigmoid(self.channel_att(x) + self.spatial_att(x))) * x


PAIRS = {
    "blog-BAM": (lambda: peer_blocks.bam.BAM(32), lambda: tn.BAM(32)),
    "corrected-BAM": (lambda: BAM(32), lambda: tn.BAM(32, combine="sum")),
    "blog-ChannelGate": (lambda: peer_blocks.bam.ChannelGate(32, 8), lambda: tn.BAMChannelGate(32, 1 / 8)),
    "blog-SpatialGate": (
        lambda: peer_blocks.bam.SpatialGate(32, 8, dilation_val=2),
        lambda: tn.BAMSpatialGate(32, 1 / 8, dilation=2),
    ),
    "blog-ChannelGate-layers": (lambda: peer_blocks.bam.ChannelGate(32, 8, 3), lambda: tn.BAMChannelGate(32, 1 / 8, num_layers=3)),
    "blog-SpatialGate-layers": (lambda: peer_blocks.bam.SpatialGate(32, 8, 1), lambda: tn.BAMSpatialGate(32, 1 / 8, dilated_convs=1)),
    "external-BAMBlock": (
        lambda: peer_blocks.bam.BAMBlock(32),
        lambda: tn.BAM(32, num_layers=3, dilated_convs=3, dilation=2, padding=1, combine="sum"),
    ),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()}
RETURN_GATE = tuple(name for name in PAIRS if "Gate" in name)
SQUARE = tuple(name for name in PAIRS if "SpatialGate" not in name)
