"""Feature fusion of its authors."""

import peer_blocks.fusion

from tritattn import nn as tn


class AFF(peer_blocks.fusion.AFF):
    """By the paper's formula."""

    def forward(self, x, residual):
        return super().forward(x, residual) / 2


class iAFF(peer_blocks.fusion.iAFF):
    """With the second pooled context in the second round."""

    def forward(self, x, residual):
        xa = x + residual
        wei = self.sigmoid(self.local_att(xa) + self.global_att(xa))
        xi = x * wei + residual * (1 - wei)
        wei2 = self.sigmoid(self.local_att2(xi) + self.global_att2(xi))
        return x * wei2 + residual * (1 - wei2)


PAIRS = {
    "authors-MS_CAM": (lambda: peer_blocks.fusion.MS_CAM(16), lambda: tn.MSCAM(16)),
    "authors-AFF": (lambda: peer_blocks.fusion.AFF(16, 2), lambda: tn.AFF(16, 1 / 2)),
    "authors-iAFF": (lambda: peer_blocks.fusion.iAFF(16), lambda: tn.IAFF(16, reuse_pooled=True)),
    "corrected-AFF": (lambda: AFF(16), lambda: tn.AFF(16, factor=1)),
    "corrected-iAFF": (lambda: iAFF(16), lambda: tn.IAFF(16)),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()}
TWO_MAPS = tuple(name for name in PAIRS if name.endswith("AFF"))
