"""Blocks of `tritattn.nn.CoordinateAttention`, `StripAttention` and `TripletAttention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .entry import EA, NoFit, Peer

_COORD = {"conv1": "conv1", "bn1": "bn1", "conv_h": "conv_h", "conv_w": "conv_w"}
_H_SWISH = ("h_sigmoid",)
_CONVS = {"conv_h": "conv_h", "conv_w": "conv_w"}
_LOCAL = {"combine": "product"}


def _skip(block: Any) -> dict[str, Any]:
    return {"residual": block.has_skip}


def _without_norm(name: str) -> Callable[[Any], dict[str, Any]]:
    def read(block: Any) -> dict[str, Any]:
        if not isinstance(getattr(block, name), nn.Identity):
            raise NoFit(f"{name} is a {type(getattr(block, name)).__name__}")
        return {"norm": False, **_skip(block)}

    return read


def _triplets(source: str, cw: str, hc: str, hw: str, layer: str) -> tuple[Peer, ...]:
    """The block with all branches, by the names of their modules and of the convolution in each, and the one without the last (no_spatial)."""
    inner = ("SpatialGate", "ChannelPool", "AttentionGate", "ZPool", "BasicConv")
    branches = {"cw": cw, "hc": hc, "hw": hw}
    paths = {f"{plane}.{kind}": f"{name}.{layer}.{kind}" for plane, name in branches.items() for kind in ("conv", "bn")}
    fewer = {ours: theirs for ours, theirs in paths.items() if not ours.startswith("hw.")}
    found = ((source, paths), (f"{source}, no_spatial", fewer))
    return tuple(Peer(name, ("TripletAttention",), "TripletAttention", layers, inner=inner) for name, layers in found)


PEERS: tuple[Peer, ...] = (
    Peer(f"houqb/CoordAttention and {EA}", ("CoordAtt",), "CoordinateAttention", _COORD, hidden="act", inner=_H_SWISH),
    Peer(
        "houqb/CoordAttention (MobileNetV2)",
        ("CoordAtt",),
        "CoordinateAttention",
        {**_COORD, "conv_h": "conv2", "conv_w": "conv3"},
        hidden="relu",
        inner=_H_SWISH,
    ),
    Peer("timm", ("CoordAttn",), "CoordinateAttention", _COORD, read=_skip, hidden="act", gates=("gate",)),
    Peer(
        "timm, norm_layer=None",
        ("CoordAttn",),
        "CoordinateAttention",
        {"conv1": "conv1", **_CONVS},
        read=_without_norm("bn1"),
        hidden="act",
        gates=("gate",),
    ),
    Peer(
        "timm",
        ("SimpleCoordAttn",),
        "CoordinateAttention",
        {"conv1": "fc1", "conv_h": "fc_h", "conv_w": "fc_w"},
        {"combine": "logits"},
        _skip,
        hidden="act",
        gates=("gate",),
    ),
    Peer(
        "timm",
        ("EfficientLocalAttn",),
        "StripAttention",
        {**_CONVS, "norm_h": "norm_h", "norm_w": "norm_w"},
        _LOCAL,
        _skip,
        hidden="act",
        gates=("gate",),
    ),
    Peer(
        "timm, norm_layer=None",
        ("EfficientLocalAttn",),
        "StripAttention",
        _CONVS,
        _LOCAL,
        _without_norm("norm_h"),
        hidden="act",
        gates=("gate",),
    ),
    Peer("timm", ("StripAttn",), "StripAttention", _CONVS, read=_skip, gates=("gate",)),
    *_triplets("landskape-ai/triplet-attention", "ChannelGateH", "ChannelGateW", "SpatialGate", "spatial"),
    *_triplets(EA, "cw", "hc", "hw", "conv"),
)
