"""timm's gather-excite, installed where it can be built and corrected where it cannot."""

import peer_blocks.timm
from peer_imports import peer
from torch import nn

from tritattn import nn as tn


def timm(*args, **kwargs):
    return peer("timm.layers").GatherExcite(*args, use_mlp=False, **kwargs)


fixed = peer_blocks.timm.GatherExcite
PAIRS = {
    "timm-GatherExcite": (lambda: timm(16, extent=4), lambda: tn.GatherExcite(extent=4, use_mlp=False)),
    "timm-GatherExcite-max": (
        lambda: timm(16, add_maxpool=True),
        lambda: tn.GatherExcite(use_mlp=False, pool="avg_max", max_grad="even"),
    ),
    "timm-GatherExcite-mlp": (
        lambda: fixed(16, extent=2, rd_channels=3, act_layer=nn.SiLU),
        lambda: tn.GatherExcite(16, extent=2, rd_channels=3, act="silu"),
    ),
    "timm-GatherExcite-params": (lambda: fixed(16, None, True, 4), lambda: tn.GatherExcite(16, None, True, 4)),
    "timm-GatherExcite-whole": (lambda: fixed(16, (7, 4), True), lambda: tn.GatherExcite(16, (7, 4), True, padded=True)),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()} | {
    "timm-GatherExcite-global": lambda: timm(16),
    "timm-GatherExcite-se": lambda: fixed(16),
    "timm-GatherExcite-theta": lambda: fixed(16, None, True, 2, use_mlp=False),
}
