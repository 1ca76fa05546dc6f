"""Attention blocks put into a plain residual network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ._base import Block, one_of
from ._derived import Derived, derived_type
from ._registry import create
from .fusion import AFF, IAFF

STAGES = ("layer1", "layer2", "layer3", "layer4")
# Where the authors put a block that does not go into every residual block.
AFTER_STAGES = {"bam": STAGES[:3], "gsop": STAGES}


class _Torchvision(Derived):
    """torchvision's BasicBlock and Bottleneck: y = relu(attention(out) + identity), in the attention's gating pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))
        identity = x if self.downsample is None else self.downsample(x)
        return self.attention(out, identity.to(out.dtype))  # autocast can leave them apart


class _Timm(Derived):
    """timm's, which have a place for attention and call it before the sum."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if hasattr(self, "conv3"):
            out = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))))
            out = self.bn3(self.conv3(out))
        else:
            out = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
            out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        return self.se(out, identity.to(out.dtype))


def attach(model: nn.Module, name: str | Callable[..., nn.Module], *, where: str | None = None, **options: Any) -> nn.Module:
    """Put an attention block into every residual block of a torchvision or timm ResNet, in place, and return the model.

    After the last normalisation of each residual block, before the sum, which AFF and iAFF take the place of: attach(resnet50(), "cbam") is the
    authors' CBAM-ResNet-50. A block of tritattn.nn then takes the sum and the ReLU that follow into its own gating pass, unless something stands
    between (stochastic depth, another activation), which AFF and iAFF cannot have. State dicts keep the plain network's keys; the block's are added
    as `attention.*`, or `se.*` in timm's networks as in its own. The blocks are initialised as in their authors' networks.

    Args:
        model: a network with residual blocks in layer1 to layer4.
        name: as in `tritattn.nn.create`, or a class or function that takes the number of channels.
        where: "blocks", or "stages" for one after each stage; by default where the authors put it: BAM after the first three stages, GSoP after
            all, every other in the blocks.
        options: of the block's constructor.

    Raises: ValueError naming the argument, for another kind of network or of block, or one that has attention already; the model is then unchanged.
    """
    after = AFTER_STAGES.get(name, STAGES) if isinstance(name, str) else STAGES
    if where is None:
        where = "stages" if isinstance(name, str) and name in AFTER_STAGES else "blocks"
    one_of("where", where, ("blocks", "stages"))
    stages = {stage: _blocks(model, stage) for stage in STAGES}
    places: list[Callable[[], None]] = []  # all are found before the first is changed
    for stage, blocks in stages.items():
        if where == "blocks":
            places += [_into(block, name, options) for block in blocks]
        elif stage in after:
            layer: Any = model.get_submodule(stage)
            attention = _make(blocks[-1], name, options)
            _takes_one(attention, name, "a stage ends without a sum")
            places.append(partial(layer.append, attention))
    for place in places:
        place()
    return model


def _blocks(model: nn.Module, stage: str) -> list[Any]:
    layer = getattr(model, stage, None)
    blocks: list[Any] = list(layer) if isinstance(layer, nn.Sequential) else []
    known = [type(b).__name__ in ("BasicBlock", "Bottleneck") and hasattr(b, "downsample") and isinstance(b.bn2, nn.BatchNorm2d) for b in blocks]
    if not known or not all(known):
        raise ValueError(f"model: got {type(model).__name__}, expected a ResNet of torchvision or timm with nothing but residual blocks in {stage}")
    return blocks


def _into(block: Any, name: Any, options: dict[str, Any]) -> Callable[[], None]:
    """What puts attention into one residual block."""
    timms = hasattr(block, "se")
    if (block.se if timms else getattr(block, "attention", None)) is not None:
        raise ValueError(f"model: got a {type(block).__name__} that has attention already, expected one without")
    last = getattr(block, ("act3" if hasattr(block, "conv3") else "act2") if timms else "relu")
    attention = _make(block, name, options)
    fuses = isinstance(attention, Block) and getattr(attention, "apply_gate", True)
    fuses = fuses and type(last) is nn.ReLU and isinstance(getattr(block, "drop_path", None), (nn.Identity, type(None)))
    if not timms and not fuses:
        raise ValueError(f"name: got {name!r}, expected a block of tritattn.nn that gates a map: torchvision's blocks have no place for another")
    if not fuses:
        _takes_one(attention, name, "stochastic depth or another activation than ReLU keeps the sum out of its reach")

    def place() -> None:
        setattr(block, "se" if timms else "attention", attention)
        if fuses:
            attention.activation = "relu"  # type: ignore[assignment]
            original: Any = type(block)
            block.__class__ = derived_type(_Timm if timms else _Torchvision, original)

    return place


def _takes_one(attention: nn.Module, name: Any, why: str) -> None:
    if isinstance(attention, (AFF, IAFF)):
        raise ValueError(f"name: got {name!r}, expected a block that takes one map: {why}")


def _make(block: Any, name: Any, options: dict[str, Any]) -> nn.Module:
    """Attention for the maps that leave a residual block, on its device and in its dtype and mode."""
    for own in ("residual", "activation"):
        if own in options:
            raise ValueError(f"{own}: got {options[own]!r}, expected none: the residual block has its own")
    channels = (block.bn3 if hasattr(block, "bn3") else block.bn2).num_features
    made = create(name, channels, **options).to(block.conv1.weight.device, block.conv1.weight.dtype).train(block.training)
    if isinstance(made, Block):
        made.initialise()
    return made
