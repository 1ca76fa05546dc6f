"""Blocks of `tritattn.nn.MSCAM`, `AFF` and `IAFF`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .entry import Peer
from .residual import promoted


def _two_maps(block: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return promoted(x, residual)


_AUTHORS = "YimianDai/open-aff"
_INSIDE = {"fc1": 0, "bn1": 1, "fc2": 3, "bn2": 4}


def _layers(rounds: int) -> dict[str, str]:
    """The sequences are called as they stand, the pool in front of `global_att` too, to which the means are a map of one position."""
    found = {}
    for ours, theirs, first in (("local", "local_att", 0), ("pooled", "global_att", 1)):
        for suffix in ("", "2")[:rounds]:
            found[ours + suffix] = theirs + suffix
            found |= {f"{ours}{suffix}.{layer}": f"{theirs}{suffix}.{first + place}" for layer, place in _INSIDE.items()}
    return found


def _peer(name: str, module: str, rounds: int = 1, variant: str = "", **more: Any) -> Peer:
    layers = _layers(rounds)
    return Peer(_AUTHORS + variant, (name,), module, layers, called=(layers["local.fc1"], *layers.values()), gates=("sigmoid",), **more)


PEERS: tuple[Peer, ...] = (
    _peer("MS_CAM", "MSCAM"),
    _peer("AFF", "AFF", inputs=2, before=_two_maps),
    _peer("AFF", "AFF", variant=", factor 1", options={"factor": 1}, inputs=2, before=_two_maps),
    _peer("iAFF", "IAFF", 2, options={"reuse_pooled": True}, inputs=2, before=_two_maps),
    _peer("iAFF", "IAFF", 2, ", global_att2", inputs=2, before=_two_maps),
)
