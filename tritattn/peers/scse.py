"""Blocks of `tritattn.nn.ConcurrentSE` and its halves."""

from __future__ import annotations

from .entry import BLOG, Peer

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
)
