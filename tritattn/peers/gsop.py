"""Blocks of `tritattn.nn.GSoP`."""

from __future__ import annotations

from typing import Any

from .entry import NoFit, Peer
from .residual import BOTTLENECK, Branch

_CHANNEL = {"conv": "conv_for_DR", "bn": "bn_for_DR", "row_bn": "row_bn", "row_conv": "row_conv_group", "fc": "fc_adapt_channels"}
_POSITION = {f"position_{ours}": f"{theirs}_for_spatial" for ours, theirs in _CHANNEL.items()}
_POSITION |= {"position_conv": "conv_for_DR_spatial", "position_bn": "bn_for_DR_spatial"}
_CONCAT = {"concat_channel": "dilate_conv_for_concat1", "concat_position": "dilate_conv_for_concat2", "concat_bn": "bn_for_concat"}
_BRANCH = Branch(BOTTLENECK)
_MODES = {"1": "channel", "2": "position", "+": "average", "M": "max", "&": "concat"}


def _mode(block: Any) -> dict[str, Any]:
    if block.attention not in _MODES:
        raise NoFit(f"its attention is {block.attention!r}")
    return {"mode": _MODES[block.attention]}


def _peer(**layers: str) -> Peer:
    return Peer(
        "ZilinGao/Global-Second-order-Pooling-Convolutional-Networks",
        ("Bottleneck",),
        "GSoP",
        layers,
        {"activation": "relu"},
        _mode,
        before=_BRANCH,
        called=(*_BRANCH.called("relu"), *layers.values()),
        common_name=True,
    )


PEERS: tuple[Peer, ...] = (
    _peer(**_CHANNEL, **_POSITION, **_CONCAT),
    _peer(**_CHANNEL, **_POSITION),
    _peer(**_CHANNEL),
    _peer(**_POSITION),
)
