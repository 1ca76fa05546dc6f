"""Blocks of two maps in tests that bring one."""

from torch import nn


class Mirrored(nn.Module):
    """A block of two maps on one and its mirror image."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x, x.flip(-1))
