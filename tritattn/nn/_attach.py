"""Attention blocks put into a plain residual network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..peers import Residual, residuals
from ._base import Block, given, one_of
from ._derived import Derived, derived_type
from ._registry import create
from .fusion import AFF, IAFF

STAGES = ("layer1", "layer2", "layer3", "layer4")
# Where the authors put a block that does not go into every residual block.
AFTER_STAGES = {"bam": STAGES[:3], "gsop": STAGES}


class Attached(Derived):
    """A residual block whose attention takes the sum and the activation that follow into its gating pass."""

    _residual: Residual

    def forward(self, x: Tensor) -> Tensor:
        residual = self._residual
        return getattr(self, residual.attention)(*residual.branch(self, x))


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
    if not blocks or not all(_residual(block) for block in blocks):
        raise ValueError(f"model: got {type(model).__name__}, expected a ResNet of torchvision or timm with nothing but residual blocks in {stage}")
    return blocks


def _residual(block: nn.Module) -> Residual | None:
    """What is known of a block of torchvision's or timm's ResNets."""
    found = [entry for entry in residuals(block) if entry.source in ("torchvision", "timm")]
    return found[0] if found and isinstance(_norm(block, found[0]), nn.BatchNorm2d) else None


def _norm(block: nn.Module, residual: Residual) -> Any:
    """The last normalisation, whose result goes to attention."""
    return getattr(block, residual.branch.steps[-1])


def _into(block: Any, name: Any, options: dict[str, Any]) -> Callable[[], None]:
    """What puts attention into one residual block."""
    residual = given("block", _residual(block))
    if getattr(block, residual.attention, None) is not None:
        raise ValueError(f"model: got a {type(block).__name__} that has attention already, expected one without")
    attention = _make(block, name, options)
    fuses = isinstance(attention, Block) and getattr(attention, "apply_gate", True)
    fuses = fuses and type(getattr(block, given("block", residual.activation))) is nn.ReLU
    fuses = fuses and isinstance(getattr(block, "drop_path", None), (nn.Identity, type(None)))
    if not hasattr(block, residual.attention) and not fuses:
        raise ValueError(f"name: got {name!r}, expected a block of tritattn.nn that gates a map: torchvision's blocks have no place for another")
    if not fuses:
        _takes_one(attention, name, "stochastic depth or another activation than ReLU keeps the sum out of its reach")

    def place() -> None:
        setattr(block, residual.attention, attention)
        if fuses:
            attention.activation = "relu"  # type: ignore[assignment]
            block._residual = residual
            original: Any = type(block)
            block.__class__ = derived_type(Attached, original)

    return place


def _takes_one(attention: nn.Module, name: Any, why: str) -> None:
    if isinstance(attention, (AFF, IAFF)):
        raise ValueError(f"name: got {name!r}, expected a block that takes one map: {why}")


def _make(block: Any, name: Any, options: dict[str, Any]) -> nn.Module:
    """Attention for the maps that leave a residual block, on its device and in its dtype and mode."""
    for own in ("residual", "activation"):
        if own in options:
            raise ValueError(f"{own}: got {options[own]!r}, expected none: the residual block has its own")
    channels = _norm(block, given("block", _residual(block))).num_features
    made = create(name, channels, **options).to(block.conv1.weight.device, block.conv1.weight.dtype).train(block.training)
    if isinstance(made, Block):
        made.initialise()
    return made
