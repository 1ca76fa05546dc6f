"""Coordinate, strip and triplet attention of other packages."""

import peer_blocks.coordinate
import peer_blocks.external
import peer_blocks.mobile
import peer_blocks.triplet
from peer_imports import peer
from torch import nn

from tritattn import nn as tn


def timm(name):
    return getattr(peer("timm.layers.coord_attn"), name)


PAIRS = {
    "authors-CoordAtt": (lambda: peer_blocks.coordinate.CoordAtt(32, 32), lambda: tn.CoordinateAttention(32)),
    "mobile-CoordAtt": (lambda: peer_blocks.mobile.CoordAtt(64, 64, 4), lambda: tn.CoordinateAttention(64, rd_ratio=1 / 4)),
    "timm-CoordAttn": (lambda: timm("CoordAttn")(32), lambda: tn.CoordinateAttention(32, 1 / 24, rd_divisor=8, bias=False)),
    "timm-CoordAttn-skip": (
        lambda: timm("CoordAttn")(32, rd_channels=5, bias=True, act_layer=nn.SiLU, norm_layer=None, gate_layer="hard_sigmoid", has_skip=True),
        lambda: tn.CoordinateAttention(32, rd_channels=5, act="silu", norm=False, gate="hard_sigmoid", residual=True),
    ),
    "timm-SimpleCoordAttn": (
        lambda: timm("SimpleCoordAttn")(32),
        lambda: tn.CoordinateAttention(32, 1 / 6, rd_divisor=8, act="silu", norm=False, combine="logits"),
    ),
    "timm-EfficientLocalAttn": (
        lambda: timm("EfficientLocalAttn")(16),
        lambda: tn.StripAttention(16, 7, act="silu", norm=True, combine="product"),
    ),
    "timm-StripAttn": (lambda: timm("StripAttn")(16, has_skip=True), lambda: tn.StripAttention(16, residual=True)),
    "authors-TripletAttention": (lambda: peer_blocks.triplet.TripletAttention(16), lambda: tn.TripletAttention(16)),
    "authors-TripletAttention-no_spatial": (
        lambda: peer_blocks.triplet.TripletAttention(16, no_spatial=True),
        lambda: tn.TripletAttention(16, spatial=False),
    ),
    "external-TripletAttention": (lambda: peer_blocks.external.TripletAttention(), lambda: tn.TripletAttention()),
    "external-TripletAttention-no_spatial": (
        lambda: peer_blocks.external.TripletAttention(no_spatial=True),
        lambda: tn.TripletAttention(spatial=False),
    ),
}
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()} | {
    "timm-EfficientLocalAttn-plain": lambda: timm("EfficientLocalAttn")(16, kernel_size=3, bias=True, norm_layer=None),
    "timm-EfficientLocalAttn-batch": lambda: timm("EfficientLocalAttn")(16, norm_layer=nn.BatchNorm2d),
}
