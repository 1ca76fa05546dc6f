"""Blocks of `tritattn.nn.SqueezeExcite`, `EffectiveSqueezeExcite` and `ECA`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .entry import EA, NoFit, Peer


def _timm_se(block: Any) -> dict[str, Any]:
    norm = getattr(block, "bn", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        raise NoFit(f"bn is a {type(norm).__name__}")
    return {"pool": "avg_max" if getattr(block, "add_maxpool", False) else "avg"}


def _timm_se_norm(block: Any) -> dict[str, Any]:
    if isinstance(block.bn, nn.Identity):
        raise NoFit("it has no norm")
    return {"pool": "avg_max" if getattr(block, "add_maxpool", False) else "avg"}


def _timm_ese(block: Any) -> dict[str, Any]:
    if getattr(block, "add_maxpool", False):
        raise NoFit("it has add_maxpool=True")
    return {}


def _timm_ese_max(block: Any) -> dict[str, Any]:
    if not getattr(block, "add_maxpool", False):
        raise NoFit("it has add_maxpool=False")
    return {}


def _timm_eca(block: Any) -> dict[str, Any]:
    if getattr(block, "conv2", None) is not None:
        raise NoFit("it has use_mlp=True")
    return {}


PEERS: tuple[Peer, ...] = (
    Peer(
        "timm",
        ("SEModule",),
        "SqueezeExcite",
        {"fc1": "fc1", "fc2": "fc2"},
        {"max_grad": "even"},
        _timm_se,
        hidden="act",
        gates=("gate",),
    ),
    Peer(
        "timm, norm_layer",
        ("SEModule",),
        "SqueezeExcite",
        {"fc1": "fc1", "fc2": "fc2", "bn": "bn"},
        {"max_grad": "even"},
        _timm_se_norm,
        hidden="act",
        gates=("gate",),
    ),
    Peer(
        "timm (EfficientNet)",
        ("SqueezeExcite",),
        "SqueezeExcite",
        {"fc1": "conv_reduce", "fc2": "conv_expand"},
        hidden="act1",
        gates=("gate",),
    ),
    Peer("timm", ("EffectiveSEModule",), "EffectiveSqueezeExcite", {"fc": "fc"}, read=_timm_ese, gates=("gate",)),
    Peer(
        "timm",
        ("EffectiveSEModule",),
        "ChannelAttention",
        {"fc2": "fc"},
        {"pools": ("avg_max",), "max_grad": "even"},
        _timm_ese_max,
        gates=("gate",),
    ),
    Peer("timm", ("EcaModule",), "ECA", {"conv": "conv"}, read=_timm_eca, gates=("gate",)),
    Peer("timm, use_mlp", ("EcaModule",), "ECA", {"expand": "conv", "conv": "conv2"}, hidden="act", gates=("gate",)),
    Peer("timm", ("CecaModule",), "ECA", {"conv": "conv"}, {"padding": "circular"}, gates=("gate",)),
    Peer(
        "torchvision",
        ("SqueezeExcitation",),
        "SqueezeExcite",
        {"fc1": "fc1", "fc2": "fc2"},
        hidden="activation",
        gates=("scale_activation",),
    ),
    Peer(
        "MONAI",
        ("ChannelSELayer", "ResidualSELayer"),
        "SqueezeExcite",
        {"fc1": "fc.0", "fc2": "fc.2"},
        read=lambda block: {"residual": block.add_residual},
        hidden="fc.1",
        gates=("fc.3",),
    ),
    Peer(
        EA,
        ("SEAttention", "SELayer"),  # the second: moskomule/senet.pytorch
        "SqueezeExcite",
        {"fc1": "fc.0", "fc2": "fc.2"},
        hidden="fc.1",
        gates=("fc.3",),
    ),
    Peer(EA, ("ECAAttention", "eca_layer"), "ECA", {"conv": "conv"}, gates=("sigmoid",)),  # the second: BangguWu/ECANet
)
