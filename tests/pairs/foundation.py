"""The SE family's blocks of other packages."""

import peer_blocks.aimed
import peer_blocks.authors
import peer_blocks.blog
import peer_blocks.external
import peer_blocks.ultralytics
from peer_imports import peer
from torch import nn

from tritattn import nn as tn


def timm(name):
    files = {"CbamModule": "cbam", "LightCbamModule": "cbam"}
    return getattr(peer(f"timm.layers.{files[name]}" if name in files else "timm.layers"), name)


def efficientnet(*args, **kwargs):
    return peer("timm.models._efficientnet_blocks").SqueezeExcite(*args, **kwargs)


def torchvision(*args, **kwargs):
    return peer("torchvision.ops.misc").SqueezeExcitation(*args, **kwargs)


def smp(*args, **kwargs):
    return peer("segmentation_models_pytorch.base.modules").SCSEModule(*args, **kwargs)


def monai(*args, **kwargs):
    return peer("monai.networks.blocks.squeeze_and_excitation").ChannelSELayer(*args, **kwargs)


# name -> (the other block, ours with the options that match)
PAIRS = {
    "blog-sSE": (lambda: peer_blocks.blog.sSE(16), lambda: tn.SpatialSE(16, bias=False)),
    "blog-cSE": (lambda: peer_blocks.blog.cSE(16), lambda: tn.ChannelSE(16, bias=False, act="none")),
    "blog-csSE": (lambda: peer_blocks.blog.csSE(16), lambda: tn.ConcurrentSE(16, bias=False, act="none")),
    "blog-ChannelAttention": (
        lambda: peer_blocks.blog.ChannelAttention(16),
        lambda: tn.ChannelAttention(16, rd_ratio=1 / 4, bias=False, apply=False),
    ),
    "blog-SpatialAttention": (
        lambda: peer_blocks.blog.SpatialAttention(3),
        lambda: tn.SpatialAttention(16, 3, order="mean_max", norm=False, apply=False),
    ),
    "timm-SEModule": (
        lambda: timm("SEModule")(32, act_layer=nn.SiLU, gate_layer="hard_sigmoid"),
        lambda: tn.SqueezeExcite(32, act="silu", gate="hard_sigmoid"),
    ),
    "timm-SEModule-max": (
        lambda: timm("SEModule")(32, rd_channels=5, add_maxpool=True, bias=False),
        lambda: tn.SqueezeExcite(32, rd_channels=5, pool="avg_max", bias=False, max_grad="even"),
    ),
    "timm-SEModule-norm": (
        lambda: timm("SEModule")(32, rd_channels=5, norm_layer=nn.BatchNorm2d),
        lambda: tn.SqueezeExcite(32, rd_channels=5, norm=True, max_grad="even"),
    ),
    "timm-SqueezeExcite": (lambda: efficientnet(32), lambda: tn.SqueezeExcite(32, rd_channels=8)),
    "timm-EffectiveSEModule": (lambda: timm("EffectiveSEModule")(16), lambda: tn.EffectiveSqueezeExcite(16)),
    "timm-EffectiveSEModule-max": (
        lambda: timm("EffectiveSEModule")(16, add_maxpool=True),
        lambda: tn.ChannelAttention(16, bottleneck=False, pools=("avg_max",), gate="hard_sigmoid", max_grad="even"),
    ),
    "timm-EcaModule": (lambda: timm("EcaModule")(128), lambda: tn.ECA(128)),
    "timm-EcaModule-mlp": (lambda: timm("EcaModule")(128, use_mlp=True), lambda: tn.create("ecam", 128)),
    "timm-CecaModule": (lambda: timm("CecaModule")(128), lambda: tn.ECA(128, padding="circular")),
    "timm-CbamModule": (
        lambda: timm("CbamModule")(32, mlp_bias=True),
        lambda: tn.CBAM(32, order="mean_max", momentum=0.1, max_grad="even"),
    ),
    "timm-LightCbamModule": (
        lambda: timm("LightCbamModule")(32),
        lambda: tn.CBAM(32, pools=("avg_max",), mlp_bias=False, order="mix", momentum=0.1, max_grad="even"),
    ),
    "torchvision-SqueezeExcitation": (lambda: torchvision(32, 6), lambda: tn.SqueezeExcite(32, rd_channels=6)),
    "authors-ChannelSELayer": (lambda: peer_blocks.aimed.ChannelSELayer(16), lambda: tn.ChannelSE(16)),
    "authors-SpatialSELayer": (lambda: peer_blocks.aimed.SpatialSELayer(16), lambda: tn.SpatialSE(16)),
    "authors-ChannelSpatialSELayer": (lambda: peer_blocks.aimed.ChannelSpatialSELayer(16, 4), lambda: tn.ConcurrentSE(16, 1 / 4, combine="max")),
    "smp-SCSEModule": (lambda: smp(32), lambda: tn.ConcurrentSE(32, rd_ratio=1 / 16)),
    "monai-ChannelSELayer": (
        lambda: monai(2, 16, add_residual=True),
        lambda: tn.SqueezeExcite(16, rd_channels=8, residual=True),
    ),
    "authors-CBAM": (lambda: peer_blocks.authors.CBAM(32), lambda: tn.CBAM(32)),
    "authors-CBAM-pools": (
        lambda: peer_blocks.authors.CBAM(32, 8, ["avg", "max", "lp", "lse"]),
        lambda: tn.CBAM(32, rd_ratio=1 / 8, pools=("avg", "max", "lp", "lse")),
    ),
    "authors-CBAM-no_spatial": (lambda: peer_blocks.authors.CBAM(32, no_spatial=True), lambda: tn.ChannelAttention(32)),
    "ultralytics-CBAM": (
        lambda: peer_blocks.ultralytics.CBAM(16),
        lambda: tn.CBAM(16, bottleneck=False, pools=("avg",), order="mean_max", norm=False),
    ),
    "external-SEAttention": (
        lambda: peer_blocks.external.SEAttention(32),
        lambda: tn.SqueezeExcite(32, rd_divisor=None, bias=False),
    ),
    "external-ECAAttention": (lambda: peer_blocks.external.ECAAttention(), lambda: tn.ECA(kernel_size=3, bias=True)),
    "external-CBAMBlock": (
        lambda: peer_blocks.external.CBAMBlock(32, kernel_size=7),
        lambda: tn.CBAM(32, mlp_bias=False, norm=False, spatial_bias=True, residual=True),
    ),
}

# Every block that is converted, by name; the pairs' and more of their options.
BLOCKS = {name: theirs for name, (theirs, _) in PAIRS.items()} | {
    "blog-BasicBlock": lambda: peer_blocks.blog.BasicBlock(8, 8),
    "blog-BasicBlock-stride": lambda: peer_blocks.blog.BasicBlock(4, 8, 2, nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8))),
    "timm-CecaModule-bias": lambda: timm("CecaModule")(64, act_layer=nn.ReLU),
    "timm-CbamModule-gates": lambda: timm("CbamModule")(32, spatial_kernel_size=3, gate_layer="hard_sigmoid", act_layer=nn.SiLU),
    "monai-1d": lambda: monai(1, 16),
    "monai-3d": lambda: monai(3, 16, acti_type_1="leakyrelu", acti_type_2="relu"),
    "external-CBAMBlock-49": lambda: peer_blocks.external.CBAMBlock(32),
}
# The same blocks under the names that they have in moskomule/senet.pytorch and BangguWu/ECANet.
SELayer = type("SELayer", (peer_blocks.external.SEAttention,), {})
eca_layer = type("eca_layer", (peer_blocks.external.ECAAttention,), {})
BLOCKS |= {"SELayer": lambda: SELayer(32), "eca_layer": lambda: eca_layer(5)}
RANKS = {"monai-1d": 3, "monai-3d": 5}
RETURN_GATE = ("blog-ChannelAttention", "blog-SpatialAttention")
