"""Blocks of `tritattn.nn.BAM` and its branches."""

from __future__ import annotations

from .entry import EA, Peer

_AUTHORS = "Jongchan/attention-module"  # and 0809zheng.github.io, without the line that raises a NameError


def _under(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    """A branch, and its layers by number."""
    return {ours: theirs, **{f"{ours}.{number}": f"{theirs}.{name}" for number, name in names.items()}}


_CHANNEL = {"0": "gate_c_fc_0", "1": "gate_c_bn_1", "3": "gate_c_fc_final"}
_SPATIAL = {
    "0": "gate_s_conv_reduce0",
    "1": "gate_s_bn_reduce0",
    "3": "gate_s_conv_di_0",
    "4": "gate_s_bn_di_0",
    "6": "gate_s_conv_di_1",
    "7": "gate_s_bn_di_1",
    "9": "gate_s_conv_final",
}
_EA_CHANNEL = {f"{3 * i + j}": f"{name}{i}" for i in range(3) for j, name in enumerate(("fc", "bn"))} | {"9": "last_fc"}
_EA_SPATIAL = {"0": "conv_reduce1", "1": "bn_reduce1", "12": "last_conv"}
_EA_SPATIAL |= {f"{3 * i + j + 3}": f"{name}_{i}" for i in range(3) for j, name in enumerate(("conv", "bn"))}

PEERS: tuple[Peer, ...] = (
    Peer(
        _AUTHORS,
        ("BAM",),
        "BAM",
        {**_under("channel.mlp", "channel_att.gate_c", _CHANNEL), **_under("spatial.convs", "spatial_att.gate_s", _SPATIAL)},
        inner=("ChannelGate", "SpatialGate"),
        called=("channel_att.gate_c", "spatial_att.gate_s"),
        square=True,
    ),
    Peer(
        _AUTHORS,
        ("ChannelGate",),
        "BAMChannelGate",
        _under("mlp", "gate_c", _CHANNEL),
        called=("gate_c",),
        square=True,
        common_name=True,
    ),
    Peer(
        _AUTHORS,
        ("SpatialGate",),
        "BAMSpatialGate",
        _under("convs", "gate_s", _SPATIAL),
        called=("gate_s",),
        common_name=True,
    ),
    Peer(
        EA,
        ("BAMBlock",),
        "BAM",
        {**_under("channel.mlp", "ca.ca", _EA_CHANNEL), **_under("spatial.convs", "sa.sa", _EA_SPATIAL)},
        {"combine": "sum"},
        gates=("sigmoid",),
        inner=("ChannelAttention", "SpatialAttention"),
        called=("ca.ca", "sa.sa"),
        square=True,
    ),
)
