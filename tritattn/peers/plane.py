"""Blocks of `tritattn.nn.ShuffleAttention` and `SimAM`."""

from __future__ import annotations

from .entry import EA, Peer

_SHUFFLE = {name: name for name in ("cweight", "cbias", "sweight", "sbias", "gn")}
PEERS: tuple[Peer, ...] = (
    Peer(
        "wofmanaf/SA-Net",
        ("sa_layer",),
        "ShuffleAttention",
        _SHUFFLE,
        read=lambda block: {"groups": block.groups, "channels": 2 * block.groups * block.cweight.numel()},
        gates=("sigmoid",),
    ),
    Peer(
        EA,
        ("ShuffleAttention",),
        "ShuffleAttention",
        _SHUFFLE,
        read=lambda block: {"groups": block.G, "channels": 2 * block.G * block.cweight.numel()},
        gates=("sigmoid",),
    ),
    Peer(
        EA,
        ("SimAM", "simam_module"),  # the second: the authors', ZjjConan/SimAM
        "SimAM",
        {},
        read=lambda block: {"e_lambda": block.e_lambda},
        gates=("activaton",),
    ),
)
