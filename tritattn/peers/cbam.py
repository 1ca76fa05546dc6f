"""Blocks of `tritattn.nn.CBAM` and its halves."""

from __future__ import annotations

from .entry import BLOG, EA, Peer
from .residual import BASIC, Branch

_BRANCH = Branch(BASIC)
_AUTHORS = "Jongchan/attention-module"
_TIMM_CBAM = {"channel.fc1": "channel.fc1", "channel.fc2": "channel.fc2", "spatial.conv": "spatial.conv.conv", "spatial.bn": "spatial.conv.bn"}
PEERS: tuple[Peer, ...] = (
    Peer(
        BLOG,
        ("ChannelAttention",),
        "ChannelAttention",
        {"fc1": "sharedMLP.0", "fc2": "sharedMLP.2"},
        {"apply": False},
        hidden="sharedMLP.1",
        gates=("sigmoid",),
    ),
    Peer(
        BLOG,
        ("SpatialAttention",),
        "SpatialAttention",
        {"conv": "conv"},
        {"order": "mean_max", "apply": False},
        gates=("sigmoid",),
    ),
    Peer(
        BLOG,
        ("BasicBlock",),
        "CBAM",
        {"channel.fc1": "ca.sharedMLP.0", "channel.fc2": "ca.sharedMLP.2", "spatial.conv": "sa.conv"},
        {"order": "mean_max", "activation": "relu"},
        hidden="ca.sharedMLP.1",
        gates=("ca.sigmoid",),
        spatial_gate="sa.sigmoid",
        inner=("ChannelAttention", "SpatialAttention"),
        before=_BRANCH,
        called=_BRANCH.called("relu"),
        common_name=True,
    ),
    Peer(
        "timm",
        ("CbamModule",),
        "CBAM",
        _TIMM_CBAM,
        {"order": "mean_max", "max_grad": "even"},
        hidden="channel.act",
        gates=("channel.gate",),
        spatial_gate="spatial.gate",
        inner=("ChannelAttn", "SpatialAttn", "ConvNormAct"),
    ),
    Peer(
        "timm",
        ("LightCbamModule",),
        "CBAM",
        _TIMM_CBAM,
        {"pools": ("avg_max",), "order": "mix", "max_grad": "even"},  # its channel half ignores its own gate: always sigmoid
        hidden="channel.act",
        spatial_gate="spatial.gate",
        inner=("LightChannelAttn", "LightSpatialAttn", "ConvNormAct"),
    ),
    Peer(
        _AUTHORS,
        ("CBAM",),
        "CBAM",
        {
            "channel.fc1": "ChannelGate.mlp.1",
            "channel.fc2": "ChannelGate.mlp.3",
            "spatial.conv": "SpatialGate.spatial.conv",
            "spatial.bn": "SpatialGate.spatial.bn",
        },
        {"order": "max_mean"},
        lambda block: {"pools": tuple(block.ChannelGate.pool_types)},
        hidden="ChannelGate.mlp.2",
        inner=("ChannelGate", "SpatialGate", "ChannelPool", "BasicConv"),
    ),
    Peer(
        f"{_AUTHORS}, no_spatial",
        ("CBAM",),
        "ChannelAttention",
        {"fc1": "ChannelGate.mlp.1", "fc2": "ChannelGate.mlp.3"},
        {},
        lambda block: {"pools": tuple(block.ChannelGate.pool_types)},
        hidden="ChannelGate.mlp.2",
        inner=("ChannelGate",),
    ),
    Peer(
        "ultralytics",
        ("CBAM",),
        "CBAM",
        {"channel.fc2": "channel_attention.fc", "spatial.conv": "spatial_attention.cv1"},
        {"pools": ("avg",), "order": "mean_max"},
        gates=("channel_attention.act",),
        spatial_gate="spatial_attention.act",
        inner=("ChannelAttention", "SpatialAttention"),
    ),
    Peer(
        EA,
        ("CBAMBlock",),
        "CBAM",
        {"channel.fc1": "ca.se.0", "channel.fc2": "ca.se.2", "spatial.conv": "sa.conv"},
        {"order": "max_mean", "residual": True},
        hidden="ca.se.1",
        gates=("ca.sigmoid",),
        spatial_gate="sa.sigmoid",
        inner=("ChannelAttention", "SpatialAttention"),
    ),
)
