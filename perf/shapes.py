"""Named sets of the feature maps at which networks place an attention block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Site:
    """`count` blocks on maps of [c, h, w] with a bottleneck of `rd` channels."""

    count: int
    c: int
    h: int
    w: int
    rd: int


@dataclass(frozen=True)
class ShapeSet:
    sites: tuple[Site, ...]
    batches: tuple[int, ...]  # the most important first
    blocks: tuple[str, ...]  # the blocks that the network is built with
    params: dict[str, Any] = field(default_factory=dict)  # options in which its blocks differ from the defaults
    epilogues: bool = True  # whether a residual sum or an activation may follow the block


_RESNET50 = (Site(3, 256, 56, 56, 16), Site(4, 512, 28, 28, 32), Site(6, 1024, 14, 14, 64), Site(3, 2048, 7, 7, 128))

SETS = {
    "se_resnet50": ShapeSet(_RESNET50, (256, 32, 1), ("se", "norm_se", "ese", "eca")),
    "cbam_resnet50": ShapeSet(_RESNET50, (256, 32, 1), ("cbam", "channel_attention", "spatial_attention")),
    "sa_resnet50": ShapeSet(_RESNET50, (256, 32, 1), ("shuffle", "simam", "ge"), {"groups": 64}),
    "mobilenetv3": ShapeSet(
        (
            Site(2, 120, 28, 28, 32),
            Site(1, 480, 14, 14, 120),
            Site(1, 672, 14, 14, 168),
            Site(2, 960, 7, 7, 240),
            Site(1, 72, 28, 28, 24),
            Site(1, 672, 7, 7, 168),
        ),
        (256, 1),
        ("se",),
        {"gate": "hard_sigmoid"},
        epilogues=False,
    ),
    "efficientnet_b0": ShapeSet(
        (
            Site(1, 32, 112, 112, 8),
            Site(1, 144, 56, 56, 6),
            Site(1, 96, 56, 56, 4),
            Site(4, 1152, 7, 7, 48),
            Site(2, 672, 14, 14, 28),
            Site(3, 480, 14, 14, 20),
            Site(1, 240, 28, 28, 10),
            Site(1, 144, 28, 28, 6),
            Site(1, 240, 14, 14, 10),
            Site(1, 672, 7, 7, 28),
        ),
        (256, 1),
        ("se", "norm_silu_se"),
        {"hidden": "silu"},
        epilogues=False,
    ),
    # the decoder of a U-Net over ResNet-34 at 256x256: a block on each concatenation and one on each output
    "scse_unet": ShapeSet(
        (
            Site(1, 128, 128, 128, 8),
            Site(1, 192, 64, 64, 12),
            Site(1, 16, 256, 256, 1),
            Site(1, 384, 32, 32, 24),
            Site(1, 32, 128, 128, 2),
            Site(1, 64, 64, 64, 4),
            Site(1, 768, 16, 16, 48),
            Site(1, 128, 32, 32, 8),
            Site(1, 256, 16, 16, 16),
        ),
        (16, 1),
        ("scse", "scse_max", "cse", "sse"),
    ),
    # the blocks of GC-ResNet-50, between the second and the last convolution of a residual block
    "gcresnet50": ShapeSet(
        (Site(3, 64, 56, 56, 8), Site(4, 128, 28, 28, 16), Site(6, 256, 14, 14, 32), Site(3, 512, 7, 7, 64)),
        (256, 1),
        ("gc", "gc_scale"),
        epilogues=False,
    ),
    # the last block of each stage, the fourth with stride 1
    "gsop_resnet50": ShapeSet(
        (Site(1, 256, 56, 56, 16), Site(1, 512, 28, 28, 32), Site(1, 1024, 14, 14, 64), Site(1, 2048, 14, 14, 128)), (384, 32), ("gsop",)
    ),
    # of the ResNeXt-50 with selective kernels, after its two branches
    "sk_resnext50": ShapeSet(
        (Site(3, 128, 56, 56, 32), Site(4, 256, 28, 28, 32), Site(6, 512, 14, 14, 32), Site(3, 1024, 7, 7, 64)),
        (256, 32, 1),
        ("sk",),
        epilogues=False,
    ),
    # the output of the split attention; its input has twice the channels
    "resnest50": ShapeSet(
        (
            Site(3, 64, 56, 56, 32),
            Site(1, 128, 56, 56, 64),
            Site(3, 128, 28, 28, 64),
            Site(1, 256, 28, 28, 128),
            Site(5, 256, 14, 14, 128),
            Site(1, 512, 14, 14, 256),
            Site(2, 512, 7, 7, 256),
        ),
        (256, 32, 1),
        ("splat",),
        epilogues=False,
    ),
    # MobileNetV2 with coordinate attention
    "coord_mobilenetv2": ShapeSet(
        (
            Site(1, 144, 56, 56, 8),
            Site(1, 96, 56, 56, 8),
            Site(4, 384, 14, 14, 12),
            Site(2, 192, 28, 28, 8),
            Site(2, 576, 14, 14, 18),
            Site(3, 960, 7, 7, 30),
            Site(1, 144, 28, 28, 8),
            Site(1, 192, 14, 14, 8),
            Site(1, 576, 7, 7, 18),
        ),
        (256, 1),
        ("coord",),
        epilogues=False,
    ),
    "triplet_resnet50": ShapeSet(_RESNET50, (256, 32, 1), ("triplet", "strip", "coord")),
    # after the first three stages of a ResNet-50
    "bam_resnet50": ShapeSet((Site(1, 256, 56, 56, 16), Site(1, 512, 28, 28, 32), Site(1, 1024, 14, 14, 64)), (256, 1), ("bam",)),
    # in place of the sums of a ResNet-50
    "aff_resnet50": ShapeSet(_RESNET50, (256, 32), ("aff", "iaff", "mscam", "blend")),
    "square": ShapeSet(
        tuple(Site(1, c, s, s, c // 16) for c in (256, 64, 1024) for s in (56, 28, 14, 7)),
        (64,),
        (
            *("se", "ese", "eca", "cse", "sse", "scse", "scse_max", "cbam", "channel_attention", "spatial_attention"),
            *("gc", "gc_scale", "coord", "strip", "triplet"),
        ),
    ),
}

# The four stages at which traffic is counted.
STAGES = _RESNET50
