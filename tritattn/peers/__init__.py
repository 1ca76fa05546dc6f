"""What is known of other packages' blocks: one entry per block, for `convert` and for loading checkpoints alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from . import axis, cbam, channel, context, fusion, gsop, joint, local, plane, scse, select
from .entry import GATES, HIDDEN, NoFit, Peer
from .residual import RESIDUALS, Branch, Residual, Tail

__all__ = ["GATES", "HIDDEN", "PEERS", "RESIDUALS", "Branch", "NoFit", "Peer", "Residual", "Tail", "candidates", "residuals"]

FAMILIES = (channel, scse, cbam, context, gsop, plane, select, axis, local, joint, fusion)
PEERS: tuple[Peer, ...] = tuple(peer for family in FAMILIES for peer in family.PEERS)
_BY_CLASS: dict[str, list[Peer]] = {}
for _peer in PEERS:
    for _name in _peer.classes:
        _BY_CLASS.setdefault(_name, []).append(_peer)


def candidates(block: nn.Module) -> Sequence[Peer]:
    """The entries that go by the block's class name."""
    return _BY_CLASS.get(_class_name(block), ())


def residuals(block: nn.Module) -> list[Residual]:
    """The entries of residual blocks that have the block's class name and modules; attention may be missing."""
    name = _class_name(block)
    return [entry for entry in RESIDUALS if name in entry.classes and entry.fits(block)]


def _class_name(block: nn.Module) -> str:
    """Under FSDP2 that of the class below FSDP's own."""
    names = [kind.__name__ for kind in type(block).__mro__]
    return names[2] if "FSDPModule" in names else names[0]
