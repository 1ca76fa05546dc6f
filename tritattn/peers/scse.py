"""Blocks of `tritattn.nn.ConcurrentSE` and its halves."""

from __future__ import annotations

from .entry import BLOG, Peer

_AUTHORS = "ai-med/squeeze_and_excitation"
PEERS: tuple[Peer, ...] = (
    Peer(BLOG, ("sSE",), "SpatialSE", {"conv": "Conv1x1"}, gates=("norm",)),
    Peer(
        BLOG,
        ("cSE",),
        "ChannelSE",
        {"fc1": "Conv_Squeeze", "fc2": "Conv_Excitation"},
        {"act": "none"},
        gates=("norm",),
    ),
    Peer(
        BLOG,
        ("csSE",),
        "ConcurrentSE",
        {"channel.fc1": "cSE.Conv_Squeeze", "channel.fc2": "cSE.Conv_Excitation", "spatial.conv": "sSE.Conv1x1"},
        {"act": "none"},
        gates=("cSE.norm", "sSE.norm"),
        inner=("cSE", "sSE"),
    ),
    Peer(
        "segmentation_models_pytorch",
        ("SCSEModule",),
        "ConcurrentSE",
        {"channel.fc1": "cSE.1", "channel.fc2": "cSE.3", "spatial.conv": "sSE.0"},
        hidden="cSE.2",
        gates=("cSE.4", "sSE.1"),
    ),
    Peer(_AUTHORS, ("ChannelSELayer",), "ChannelSE", {"fc1": "fc1", "fc2": "fc2"}, hidden="relu", gates=("sigmoid",), common_name=True),
    Peer(_AUTHORS, ("SpatialSELayer",), "SpatialSE", {"conv": "conv"}, gates=("sigmoid",)),
    Peer(
        _AUTHORS,
        ("ChannelSpatialSELayer",),
        "ConcurrentSE",
        {"channel.fc1": "cSE.fc1", "channel.fc2": "cSE.fc2", "spatial.conv": "sSE.conv"},
        {"combine": "max"},
        hidden="cSE.relu",
        gates=("cSE.sigmoid", "sSE.sigmoid"),
        inner=("ChannelSELayer", "SpatialSELayer"),
    ),
)
