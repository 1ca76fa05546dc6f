"""Blocks of `tritattn.nn.CBAM` and its halves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .entry import BLOG, EA, Peer


def _basic_block(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    residual = x if block.downsample is None else block.downsample(x)
    return out, residual.to(out.dtype)  # autocast can leave them apart; the original adds in place


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
        before=_basic_block,
        called=("conv1", "bn1", "conv2", "bn2", "downsample"),
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
