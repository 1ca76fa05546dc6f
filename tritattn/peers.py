"""What is known of other packages' blocks: one entry per block, for `convert` and for loading checkpoints alike.

An entry maps the layers of a `tritattn.nn` module to those of the other block and says with which options the module computes the same. A
block is recognised by its class name together with the names and shapes of its parameters, so that a copy pasted from a paper's
repository counts; many packages use the same name for different blocks, and none of it is trusted: `convert` runs both before it swaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Activation modules by class name; several packages have their own of the same name.
HIDDEN = {
    "GELU": "gelu",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
    "Hardswish": "hardswish",
    "Identity": "none",
    "LeakyReLU": "leaky_relu",
    "MemoryEfficientSwish": "silu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "Swish": "silu",
    "SwishMe": "silu",
}
GATES = {
    "HardSigmoid": "hard_sigmoid",
    "HardSigmoidMe": "hard_sigmoid",
    "Hardsigmoid": "hard_sigmoid",
    "Identity": "none",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
}


class NoFit(Exception):
    """Why a block is not the one of an entry although its class has that name."""


@dataclass(frozen=True)
class Peer:
    """One block of one package, and the `tritattn.nn` module that computes the same."""

    source: str
    classes: tuple[str, ...]  # names under which it is found
    module: str  # class in tritattn.nn
    layers: Mapping[str, str]  # path of a layer in the module -> its path in the block
    options: Mapping[str, Any] = field(default_factory=dict)  # constructor options that all such blocks have in common
    read: Callable[[Any], dict[str, Any]] = lambda block: {}  # those that depend on the block; raises NoFit
    hidden: str | None = None  # path of the activation in the bottleneck
    gates: tuple[str, ...] = ()  # paths of the gate's activation, all of one type
    spatial_gate: str | None = None
    inner: tuple[str, ...] = ()  # class names of modules inside that only call those named here
    before: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None  # x -> (map, residual), through modules of the block
    called: tuple[str, ...] = ()  # paths of the modules that `before` calls
    common_name: bool = False  # the class name says little: a block without these layers is somebody else's

    def __str__(self) -> str:
        return f"{self.source} {self.classes[0]}"


def _timm_se(block: Any) -> dict[str, Any]:
    norm = getattr(block, "bn", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        raise NoFit(f"bn is a {type(norm).__name__}; a norm between the two layers is not fused")
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
        raise NoFit("it has use_mlp=True, whose two convolutions are not fused")
    return {}


def _basic_block(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    residual = x if block.downsample is None else block.downsample(x)
    return out, residual.to(out.dtype)  # autocast can leave them apart; the original adds in place


_BLOG = "0809zheng.github.io"
_EA = "External-Attention-pytorch"
_AUTHORS = "Jongchan/attention-module"
_TIMM_CBAM = {"channel.fc1": "channel.fc1", "channel.fc2": "channel.fc2", "spatial.conv": "spatial.conv.conv", "spatial.bn": "spatial.conv.bn"}

PEERS: tuple[Peer, ...] = (
    Peer(_BLOG, ("sSE",), "SpatialSE", {"conv": "Conv1x1"}, gates=("norm",)),
    Peer(
        _BLOG,
        ("cSE",),
        "ChannelSE",
        {"fc1": "Conv_Squeeze", "fc2": "Conv_Excitation"},
        {"act": "none"},
        gates=("norm",),
    ),
    Peer(
        _BLOG,
        ("csSE",),
        "ConcurrentSE",
        {"channel.fc1": "cSE.Conv_Squeeze", "channel.fc2": "cSE.Conv_Excitation", "spatial.conv": "sSE.Conv1x1"},
        {"act": "none"},
        gates=("cSE.norm", "sSE.norm"),
        inner=("cSE", "sSE"),
    ),
    Peer(
        _BLOG,
        ("ChannelAttention",),
        "ChannelAttention",
        {"fc1": "sharedMLP.0", "fc2": "sharedMLP.2"},
        {"apply": False},
        hidden="sharedMLP.1",
        gates=("sigmoid",),
    ),
    Peer(
        _BLOG,
        ("SpatialAttention",),
        "SpatialAttention",
        {"conv": "conv"},
        {"order": "mean_max", "apply": False},
        gates=("sigmoid",),
    ),
    Peer(
        _BLOG,
        ("BasicBlock",),
        "CBAM",
        {"channel.fc1": "ca.sharedMLP.0", "channel.fc2": "ca.sharedMLP.2", "spatial.conv": "sa.conv"},
        {"order": "mean_max", "activation": "relu"},
        hidden="ca.sharedMLP.1",
        gates=("ca.sigmoid",),
        spatial_gate="sa.sigmoid",
        inner=("ChannelAttention", "SpatialAttention"),
        before=_basic_block,
        called=("conv1", "bn1", "conv2", "bn2", "downsample"),
        common_name=True,
    ),
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
    Peer("timm", ("CecaModule",), "ECA", {"conv": "conv"}, {"padding": "circular"}, gates=("gate",)),
    Peer(
        "timm",
        ("CbamModule",),
        "CBAM",
        _TIMM_CBAM,
        {"order": "mean_max", "max_grad": "even"},
        hidden="channel.act",
        gates=("channel.gate",),
        spatial_gate="spatial.gate",
        inner=("ChannelAttn", "SpatialAttn", "ConvNormAct"),
    ),
    Peer(
        "timm",
        ("LightCbamModule",),
        "CBAM",
        _TIMM_CBAM,
        {"pools": ("avg_max",), "order": "mix", "max_grad": "even"},  # its channel half ignores its own gate: always sigmoid
        hidden="channel.act",
        spatial_gate="spatial.gate",
        inner=("LightChannelAttn", "LightSpatialAttn", "ConvNormAct"),
    ),
    Peer(
        "torchvision",
        ("SqueezeExcitation",),
        "SqueezeExcite",
        {"fc1": "fc1", "fc2": "fc2"},
        hidden="activation",
        gates=("scale_activation",),
    ),
    Peer(
        "segmentation_models_pytorch",
        ("SCSEModule",),
        "ConcurrentSE",
        {"channel.fc1": "cSE.1", "channel.fc2": "cSE.3", "spatial.conv": "sSE.0"},
        hidden="cSE.2",
        gates=("cSE.4", "sSE.1"),
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
        _AUTHORS,
        ("CBAM",),
        "CBAM",
        {
            "channel.fc1": "ChannelGate.mlp.1",
            "channel.fc2": "ChannelGate.mlp.3",
            "spatial.conv": "SpatialGate.spatial.conv",
            "spatial.bn": "SpatialGate.spatial.bn",
        },
        {"order": "max_mean"},
        lambda block: {"pools": tuple(block.ChannelGate.pool_types)},
        hidden="ChannelGate.mlp.2",
        inner=("ChannelGate", "SpatialGate", "ChannelPool", "BasicConv"),
    ),
    Peer(
        f"{_AUTHORS}, no_spatial",
        ("CBAM",),
        "ChannelAttention",
        {"fc1": "ChannelGate.mlp.1", "fc2": "ChannelGate.mlp.3"},
        {},
        lambda block: {"pools": tuple(block.ChannelGate.pool_types)},
        hidden="ChannelGate.mlp.2",
        inner=("ChannelGate",),
    ),
    Peer(
        "ultralytics",
        ("CBAM",),
        "CBAM",
        {"channel.fc2": "channel_attention.fc", "spatial.conv": "spatial_attention.cv1"},
        {"pools": ("avg",), "order": "mean_max"},
        gates=("channel_attention.act",),
        spatial_gate="spatial_attention.act",
        inner=("ChannelAttention", "SpatialAttention"),
    ),
    Peer(
        _EA,
        ("SEAttention", "SELayer"),  # the second: moskomule/senet.pytorch
        "SqueezeExcite",
        {"fc1": "fc.0", "fc2": "fc.2"},
        hidden="fc.1",
        gates=("fc.3",),
    ),
    Peer(_EA, ("ECAAttention", "eca_layer"), "ECA", {"conv": "conv"}, gates=("sigmoid",)),  # the second: BangguWu/ECANet
    Peer(
        _EA,
        ("CBAMBlock",),
        "CBAM",
        {"channel.fc1": "ca.se.0", "channel.fc2": "ca.se.2", "spatial.conv": "sa.conv"},
        {"order": "max_mean", "residual": True},
        hidden="ca.se.1",
        gates=("ca.sigmoid",),
        spatial_gate="sa.sigmoid",
        inner=("ChannelAttention", "SpatialAttention"),
    ),
)

_BY_CLASS: dict[str, list[Peer]] = {}
for _peer in PEERS:
    for _name in _peer.classes:
        _BY_CLASS.setdefault(_name, []).append(_peer)


def candidates(block: nn.Module) -> Sequence[Peer]:
    """The entries that go by the block's class name; under FSDP2 that is the name of the class below FSDP's own."""
    names = [kind.__name__ for kind in type(block).__mro__]
    return _BY_CLASS.get(names[2] if "FSDPModule" in names else names[0], ())
