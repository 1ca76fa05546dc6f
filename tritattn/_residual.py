"""Blocks around converted attention, whose passes take in what stands next to it: the sum and the activation at the end of a residual block, the norm
and the activation before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ._fused import NORMS, Fused, Inner, Plan
from ._match import activation_name, plain_type
from .nn._base import ChannelGate, obstacle, sublayer
from .nn._derived import original_type
from .peers import HIDDEN, Branch, NoFit, Residual, Tail, residuals
from .reference import ACTIVATIONS

LAST = {name: function for name, function in HIDDEN.items() if function in ACTIVATIONS}
RANDOM = frozenset({"DropPath", "StochasticDepth"})  # class names of modules that do nothing in evaluation
# timm's: a convolution and its norm, and a BatchNorm with an activation.
CONV_NORM = ("ConvNormAct", "ConvNormActAa", "ConvBnAct")
NORM_ACT = "BatchNormAct2d"
# What a Sequential may hold besides attention: it is verified on small maps, and takes them to maps.
ON_MAPS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def find(block: nn.Module) -> Residual | None:
    """The entry that has the block's attention where it is and has been converted."""
    for entry in residuals(block):
        attention = getattr(block, entry.attention, None)
        if isinstance(attention, Fused) and (entry.tail is None or _takes_prologue(attention)):
            return entry
    return _sequential(block)


def _takes_prologue(attention: Any) -> bool:
    """Whether it is a converted channel gate and no more than that."""
    plan = attention._tritattn if isinstance(attention, Fused) else None
    return plan is not None and plan.before is None and not plan.residual and issubclass(plan.module, ChannelGate)


def _sequential(block: nn.Module) -> Residual | None:
    """An entry of its own for a Sequential of layers on maps with one channel gate in it: torchvision's blocks are made of such."""
    if type(block).forward is not nn.Sequential.forward:
        return None
    names = list(block._modules)
    places = [i for i, module in enumerate(block._modules.values()) if module is not None and _takes_prologue(module)]
    if len(places) != 1 or not places[0]:
        return None
    for name, module in block.named_modules():
        if module is not block and name.partition(".")[0] != names[places[0]]:
            container = type(module).forward is nn.Sequential.forward
            if not container and not isinstance(module, ON_MAPS) and type(module).__name__ not in HIDDEN:
                return None
    before, after = tuple(names[: places[0]]), tuple(names[places[0] + 1 :])
    entry = Residual("torch.nn", (type(block).__name__,), Branch(before, None), names[places[0]], tail=Tail(after))
    return entry if str(_prologue(block, before)) else None


@dataclass(frozen=True)
class _Prologue:
    """What stands right before attention and can be part of its passes."""

    steps: tuple[str, ...]  # paths of the modules before that
    norm: str | None = None
    act: bool = False  # whether the norm has the activation inside
    before: str = "none"  # the activation
    inner: tuple[Inner, ...] = ()
    end: str = ""  # path of the first module that cannot be

    def __str__(self) -> str:
        return " and ".join((("BatchNorm",) if self.norm else ()) + ((self.before,) if self.before != "none" else ()))


def _prologue(block: nn.Module, steps: tuple[str, ...]) -> _Prologue:
    """Takes modules from the end of `steps`, and from inside containers, up to the first that cannot be part of attention's passes."""
    rest, before, path = list(steps), "none", ""
    inner: list[Inner] = []
    found = _Prologue(steps)
    while rest:
        path = rest[-1]
        module: Any = sublayer(block, path)
        kind, children = type(module), tuple(module._modules)
        if kind in NORMS:
            return _Prologue(tuple(rest[:-1]), path, False, before, tuple(inner))
        inner.append(Inner(tuple(path.split(".")), (kind,), children))
        if obstacle(module, (kind,)) is not None:
            break
        if children and (kind.forward is nn.Sequential.forward or (kind.__name__ in CONV_NORM and children == ("conv", "bn"))):
            rest[-1:] = [f"{path}.{name}" for name in children]
            continue
        own = kind.__name__ == NORM_ACT and children == ("drop", "act")
        act = _activation(module.act if own else module)
        if act is None or (act != "none" and before != "none"):
            break
        before = act if before == "none" else before
        if own:
            parts = [Inner((*inner[-1].path, name), (type(part),), ()) for name, part in module._modules.items()]
            if type(module.drop) is nn.Identity and all(obstacle(part, (type(part),)) is None for part in module.children()):
                return _Prologue(tuple(rest[:-1]), path, True, before, (*inner, *parts))
            break
        rest.pop()
        if before != "none":
            found = _Prologue(tuple(rest), before=before, inner=tuple(inner))
    return replace(found, end=path)


def _activation(module: nn.Module) -> str | None:
    try:
        return activation_name(HIDDEN, "", {"": module})
    except NoFit:
        return None


def make_residual_plan(entry: Residual, block: nn.Module) -> tuple[Plan, str]:
    """The plan of the block, and what it takes in: that of its attention with what stands next to it. Raises NoFit where something else does."""
    if "forward" in block.__dict__:
        raise NoFit("it has a forward of its own")
    attention: Any = getattr(block, entry.attention)
    plan: Plan = attention._tritattn
    if plan.before is not None or plan.residual or plan.inputs > 1 or plan.square:
        raise NoFit(f"{entry.attention} does more than to gate a map")
    called = entry.called()
    inner = []
    for name, module in block._modules.items():
        if module is not None and name not in called:
            kind = original_type(type(module)) if module is attention else plain_type(module)
            random = kind.__name__ in RANDOM
            if name not in (entry.attention, entry.activation) and not random and kind is not nn.Identity:
                raise NoFit(f"it has a layer that {entry} has not: {name}, a {kind.__name__}")
            problem = obstacle(module, (type(module),))
            if problem is not None:
                raise NoFit(f"{name} {problem}")
            inner.append(Inner((name,), (kind,), tuple(module._modules), random))
    inner += [replace(deeper, path=(entry.attention, *deeper.path)) for deeper in plan.inner]
    steps = entry.steps(block)
    taken = _prologue(block, steps) if issubclass(plan.module, ChannelGate) else _Prologue(steps)
    settings = {"before": taken.before} if taken.before != "none" else {}
    if entry.activation is not None:
        settings["activation"] = activation_name(LAST, entry.activation, dict(block._modules))
    elif not str(taken):
        raise NoFit(f"nothing that stands before {entry.attention} can be part of its passes: {taken.end} is {sublayer(block, taken.end)}")
    plan = replace(
        plan,
        layers=tuple(path and f"{entry.attention}.{path}" for path in plan.layers),
        settings=plan.settings | settings,
        inner=(*inner, *taken.inner),
        before=replace(entry.branch, steps=taken.steps),
        children=tuple(block._modules),
        norm=taken.norm,
        act=taken.act,
        after=entry.tail,
    )
    return plan, f"with {taken} in front" if entry.activation is None else f"with sum and {settings['activation']}"


def input_channels(entry: Residual, block: nn.Module) -> int:
    """Of the maps that the block takes."""
    for step in entry.steps(block):
        for module in sublayer(block, step).modules():
            for name in ("in_channels", "num_features", "num_channels"):  # of convolutions, BatchNorms and GroupNorms
                if hasattr(module, name):
                    return int(getattr(module, name))
    raise NoFit("none of its layers tells how many channels it takes")
