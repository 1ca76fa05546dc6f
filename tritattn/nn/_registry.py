"""The blocks by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ._base import reduced
from .bam import BAM
from .cbam import CBAM, ChannelAttention, SpatialAttention
from .coordinate import CoordinateAttention, StripAttention
from .eca import ECA
from .fusion import AFF, IAFF, MSCAM
from .gather_excite import GatherExcite
from .global_context import GlobalContext
from .gsop import GSoP
from .scse import ChannelSE, ConcurrentSE, SpatialSE
from .selective_kernel import SelectiveKernel
from .shuffle import ShuffleAttention
from .simam import SimAM
from .split_attention import SplitAttention
from .squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite
from .triplet import TripletAttention

Factory = Callable[..., nn.Module]


def _timm_ecam(channels: int, rd_ratio: float = 1 / 8, rd_channels: int | None = None, rd_divisor: int = 8, **options: Any) -> ECA:
    return ECA(channels, rule="timm", hidden_channels=reduced(channels, rd_ratio, rd_channels, rd_divisor), **options)


# The names of tritattn.ops, with the defaults of each block's authors; below them timm's names that are not among these, with timm's defaults.
_FACTORIES: dict[str, Factory] = {
    "bam": BAM,
    "aff": AFF,
    "cbam": CBAM,
    "channel_attention": ChannelAttention,
    "cse": ChannelSE,
    "coord": CoordinateAttention,
    "eca": ECA,
    "ese": EffectiveSqueezeExcite,
    "gc": GlobalContext,
    "gsop": GSoP,
    "ge": GatherExcite,
    "iaff": IAFF,
    "mscam": MSCAM,
    "scse": ConcurrentSE,
    "se": SqueezeExcite,
    "shuffle": ShuffleAttention,
    "simam": SimAM,
    "sk": SelectiveKernel,
    "spatial_attention": SpatialAttention,
    "splat": SplitAttention,
    "sse": SpatialSE,
    "strip": StripAttention,
    "triplet": TripletAttention,
    # timm's
    "ecam": _timm_ecam,
    "gca": partial(GlobalContext, rd_ratio=1 / 8, rd_divisor=1, eps=1e-6),
    "ela": partial(StripAttention, kernel_size=7, act="silu", norm=True, combine="product"),
    "scoord": partial(CoordinateAttention, rd_ratio=1 / 6, rd_divisor=8, act="silu", norm=False, combine="logits"),
    "ceca": partial(ECA, rule="timm", padding="circular"),
    "lcbam": partial(CBAM, pools=("avg_max",), mlp_bias=False, order="mix", momentum=0.1, max_grad="even"),
}


def available() -> tuple[str, ...]:
    """The names that `create` takes, those of `register` included."""
    return tuple(sorted(_FACTORIES))


def register(name: str, factory: Factory) -> None:
    """Give a block of your own a name for `create` and `attach`.

    factory: a class, or a function, whose first positional argument is the number of channels. Raises ValueError where the name is taken.
    """
    if not callable(factory):
        raise TypeError(f"factory: got {type(factory).__name__}, expected a class or a function")
    if _FACTORIES.setdefault(name, factory) is not factory:
        raise ValueError(f"name: got {name!r}, which is {_FACTORIES[name]}")


def create(name: str | Factory, channels: int, **options: Any) -> nn.Module:
    """The block of that name for maps of `channels` channels.

    Args:
        name: one of `available()`: the names of tritattn.ops, and timm's `create_attn` names where they differ. Or a class or function of your own.
        options: of its constructor; device and dtype among them.

    Raises: ValueError for an unknown name, and what the constructor raises.
    """
    if callable(name):
        return name(channels, **options)
    if name not in _FACTORIES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(available())}")
    return _FACTORIES[name](channels, **options)
