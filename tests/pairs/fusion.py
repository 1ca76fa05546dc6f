"""Feature fusion of its authors."""

import peer_blocks.fusion

from tritattn import nn as tn

PAIRS = {
    "authors-MS_CAM": (lambda: peer_blocks.fusion.MS_CAM(16), lambda: tn.MSCAM(16)),
    "authors-AFF": (lambda: peer_blocks.fusion.AFF(16, 2), lambda: tn.AFF(16, 1 / 2)),
    "authors-iAFF": (lambda: peer_blocks.fusion.iAFF(16), lambda: tn.IAFF(16, reuse_pooled=True)),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()}
TWO_MAPS = ("authors-AFF", "authors-iAFF")
