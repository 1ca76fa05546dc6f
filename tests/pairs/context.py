"""Global context blocks of other packages."""

import peer_blocks.mmcv
from peer_imports import peer

from tritattn import nn as tn

ALL = ("channel_add", "channel_mul")


def timm(*args, **kwargs):
    return peer("timm.layers").GlobalContext(*args, **kwargs)


PAIRS = {
    "timm-GlobalContext": (
        lambda: timm(16, rd_channels=4),
        lambda: tn.GlobalContext(16, rd_channels=4, fuse_add=False, fuse_scale=True, eps=1e-6),
    ),
    "timm-GlobalContext-add": (lambda: timm(32, fuse_add=True, fuse_scale=False), lambda: tn.GlobalContext(32, 1 / 8, eps=1e-6)),
    "timm-GlobalContext-avg": (
        lambda: timm(32, use_attn=False, fuse_add=True, gate_layer="hard_sigmoid"),
        lambda: tn.GlobalContext(32, 1 / 8, pool="avg", fuse_scale=True, gate="hard_sigmoid", eps=1e-6),
    ),
    "mmcv-ContextBlock": (lambda: peer_blocks.mmcv.ContextBlock(16, 1 / 4), lambda: tn.GlobalContext(16, 1 / 4)),
    "mmcv-ContextBlock-both": (
        lambda: peer_blocks.mmcv.ContextBlock(16, 1 / 4, fusion_types=ALL),
        lambda: tn.GlobalContext(16, 1 / 4, fuse_scale=True),
    ),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()} | {
    "mmcv-ContextBlock-avg": lambda: peer_blocks.mmcv.ContextBlock(16, 1 / 4, "avg", ALL[1:]),
}
