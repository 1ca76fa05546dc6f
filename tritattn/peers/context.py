"""Blocks of `tritattn.nn.GlobalContext`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .entry import Peer


def _peers(source: str, name: str, attention: str, branches: Mapping[str, str], inside: Sequence[str], **more: Any) -> tuple[Peer, ...]:
    """One entry for each choice of pooling and of branches; `inside`: where a branch has fc1, norm and fc2."""
    made = []
    for chosen in (("add",), ("scale",), ("add", "scale")):
        layers = {ours: branches[ours] for ours in chosen}
        for ours in chosen:
            layers |= {f"{ours}.{layer}": f"{branches[ours]}.{theirs}" for layer, theirs in zip(("fc1", "norm", "fc2"), inside, strict=True)}
        called = (layers[f"{chosen[0]}.fc1"], *(branches[ours] for ours in chosen))
        for attn in ({"attn": attention}, {}):
            made.append(Peer(source, (name,), "GlobalContext", {**attn, **layers}, called=called, **more))
    return tuple(made)


PEERS: tuple[Peer, ...] = (
    *_peers("timm", "GlobalContext", "conv_attn", {"add": "mlp_add", "scale": "mlp_scale"}, ("fc1", "norm", "fc2"), gates=("gate",)),
    *_peers("mmcv", "ContextBlock", "conv_mask", {"add": "channel_add_conv", "scale": "channel_mul_conv"}, ("0", "1", "3"), inner=("Softmax",)),
)
