"""GSoP's residual blocks."""

from peer_blocks.gsop import Bottleneck
from torch import nn

# the authors' blocks have attention inside, so no module of ours is their pair; test_gsop.py compares the attention alone
PAIRS = {}
BLOCKS = {f"gsop-Bottleneck-{mode}": (lambda mode=mode: Bottleneck(64, 16, attention=mode, att_dim=6)) for mode in "1+M&"}
BLOCKS["gsop-Bottleneck-stride"] = lambda: Bottleneck(8, 65, 2, nn.Sequential(nn.Conv2d(8, 260, 1, 2), nn.BatchNorm2d(260)), "1", 5)
