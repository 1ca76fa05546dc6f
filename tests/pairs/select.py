"""Selective kernels and split attention of other packages."""

import peer_blocks.external
import peer_blocks.resnest
from peer_imports import peer
from torch import nn

from tritattn import nn as tn

EA = {"keep_3x3": False, "norm": False, "path_bias": True, "bias": True, "select_bias": True, "separate": True, "act": "none"}
TIMM = {"rd_divisor": 8, "rd_min": 1}


def timm(name):
    return getattr(peer("timm.layers"), name)


PAIRS = {
    "timm-SelectiveKernel": (lambda: timm("SelectiveKernel")(16), lambda: tn.SelectiveKernel(16, split_input=True, **TIMM)),
    "timm-SelectiveKernel-whole": (
        lambda: timm("SelectiveKernel")(16, 8, [3, 5, 7], 2, groups=2, rd_channels=6, keep_3x3=False, split_input=False),
        lambda: tn.SelectiveKernel(16, 8, (3, 5, 7), 2, groups=2, rd_channels=6, keep_3x3=False),
    ),
    "timm-SplitAttn": (
        lambda: timm("SplitAttn")(16, groups=2, norm_layer=nn.BatchNorm2d),
        lambda: tn.SplitAttention(16, groups=2, rd_divisor=8),
    ),
    "timm-SplitAttn-one": (lambda: timm("SplitAttn")(16, radix=1, bias=True), lambda: tn.SplitAttention(16, radix=1, bias=True, norm=False)),
    "authors-SplAtConv2d": (
        lambda: peer_blocks.resnest.SplAtConv2d(16, 8, 3, 2, 1, groups=2, bias=False, radix=4, norm_layer=nn.BatchNorm2d),
        lambda: tn.SplitAttention(16, 8, stride=2, groups=2, radix=4),
    ),
    "external-SKAttention": (
        lambda: peer_blocks.external.SKAttention(16, reduction=8),
        lambda: tn.SelectiveKernel(16, kernel_size=(1, 3, 5, 7), rd_ratio=1 / 8, **EA),
    ),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()} | {
    "timm-SelectiveKernel-alike": lambda: timm("SelectiveKernel")(16, kernel_size=3),
    "timm-SplitAttn-silu": lambda: timm("SplitAttn")(16, 32, act_layer=nn.SiLU),
    "authors-SplAtConv2d-no-norm": lambda: peer_blocks.resnest.SplAtConv2d(16, 16, 3, padding=1),
    "external-SKAttention-two": lambda: peer_blocks.external.SKAttention(16, (3, 5), group=2),
}
