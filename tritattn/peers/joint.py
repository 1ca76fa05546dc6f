"""Blocks of `tritattn.nn.BAM` and its branches."""

from __future__ import annotations

from .entry import EA, Peer

_AUTHORS = "Jongchan/attention-module"  # and 0809zheng.github.io, without the line that raises a NameError


def _under(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    """A branch, and its layers by number."""
    return {ours: theirs, **{f"{ours}.{number}": f"{theirs}.{name}" for number, name in names.items()}}


def _channel(layers: int) -> dict[str, str]:
    """Of `layers` hidden layers."""
    names = {f"{3 * i + j}": f"gate_c_{name}" for i in range(layers) for j, name in enumerate((f"fc_{i}", f"bn_{i + 1}"))}
    return _under("mlp", "gate_c", names | {f"{3 * layers}": "gate_c_fc_final"})


def _spatial(convolutions: int) -> dict[str, str]:
    """Of `convolutions` dilated ones."""
    names = {"0": "gate_s_conv_reduce0", "1": "gate_s_bn_reduce0"}
    names |= {f"{3 * i + j + 3}": f"gate_s_{name}_di_{i}" for i in range(convolutions) for j, name in enumerate(("conv", "bn"))}
    return _under("convs", "gate_s", names | {f"{3 * convolutions + 3}": "gate_s_conv_final"})


def _inside(ours: str, theirs: str, layers: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{own}": f"{theirs}.{other}" for own, other in layers.items()}


COUNTS = range(1, 5)  # of hidden layers, and of dilated convolutions
_EA_CHANNEL = {f"{3 * i + j}": f"{name}{i}" for i in range(3) for j, name in enumerate(("fc", "bn"))} | {"9": "last_fc"}
_EA_SPATIAL = {"0": "conv_reduce1", "1": "bn_reduce1", "12": "last_conv"}
_EA_SPATIAL |= {f"{3 * i + j + 3}": f"{name}_{i}" for i in range(3) for j, name in enumerate(("conv", "bn"))}

PEERS: tuple[Peer, ...] = (
    *(
        Peer(
            _AUTHORS + variant,
            ("BAM",),
            "BAM",
            {**_inside("channel", "channel_att", _channel(1)), **_inside("spatial", "spatial_att", _spatial(2))},
            {"combine": combine},
            inner=("ChannelGate", "SpatialGate"),
            called=("channel_att.gate_c", "spatial_att.gate_s"),
            square=True,
        )
        for combine, variant in (("product", ""), ("sum", ", sum"))
    ),
    *(
        Peer(_AUTHORS, ("ChannelGate",), "BAMChannelGate", _channel(count), called=("gate_c",), square=True, common_name=True)
        for count in COUNTS
    ),
    *(Peer(_AUTHORS, ("SpatialGate",), "BAMSpatialGate", _spatial(count), called=("gate_s",), common_name=True) for count in COUNTS),
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
