"""The converted block: the same object under a class whose forward is the fused one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import nn as blocks
from ._match import Match, bypassed, plain_type, squeezed
from .nn._base import Block, obstacle, sublayer
from .nn._derived import Derived, derived_type, original_type
from .peers import NoFit

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Inner:
    """A module inside a block that is not called any more, as it was when the block was converted."""

    path: tuple[str, ...]
    kinds: tuple[type, ...]  # types that it may have
    children: tuple[str, ...] | None  # names of its own; None for a layer
    random: bool = False  # it does nothing in evaluation; while it trains it has to be called


@dataclass(frozen=True)
class Plan:
    """How a converted block runs. Plain data, so that it is copied and pickled with the block."""

    module: type[Block]  # whose fused pass it is
    layers: tuple[str | None, ...]  # paths in the block of the layers which that takes
    settings: dict[str, Any]
    residual: bool
    inputs: int  # maps that it is called with
    dims: int  # of each
    square: bool  # whether they are to be
    inner: tuple[Inner, ...]
    before: Callable[..., tuple[Any, Tensor | None]] | None
    children: tuple[str, ...] | None = None  # names of the block's own, where one more would be called
    norm: str | None = None  # path of the block's layer right before attention, which may be part of attention's passes
    act: bool = False  # whether that layer's type adds an activation to its BatchNorm, which is part of the passes in any case
    after: Callable[..., Tensor] | None = None  # (block, what the fused pass returns, *maps) -> what the block returns

    def covers(self, block: nn.Module, *maps: Any) -> bool:
        """Whether the fused pass does all that the original forward would: nothing inside has been changed or hooked since."""
        if len(maps) != self.inputs:
            return False
        for x in maps:
            if not isinstance(x, Tensor) or x.dim() != self.dims or (self.square and x.shape[-2] != x.shape[-1]):
                return False
        if self.children is not None and tuple(block._modules) != self.children:
            return False
        for inner in self.inner:
            module: Any = block
            for name in inner.path:
                module = module._modules.get(name)
                if module is None:
                    return False
            converted = isinstance(module, Fused) and original_type(type(module)) in inner.kinds
            if obstacle(module, (type(module),) if converted else inner.kinds) is not None or (inner.random and module.training):
                return False
            if inner.children is not None and tuple(module._modules) != inner.children:
                return False
        return self.norm is None or not self.act or not is_parametrized(sublayer(block, self.norm))  # its type then computes its weight

    def run(self, block: nn.Module, *maps: Tensor) -> Tensor:
        x, residual = (maps[0], maps[0] if self.residual else None) if self.before is None else self.before(block, *maps)
        layers = [None if path is None else sublayer(block, path) for path in self.layers]
        norm = None if self.norm is None else sublayer(block, self.norm)
        preceded = {} if norm is None else {"before_norm": _alone(norm) if self.act else norm}
        y = self.module.fused(x, *layers, residual=residual, **preceded, **self.settings)
        return y if self.after is None else self.after(block, y, *maps)


def _alone(norm: nn.Module) -> nn.Module:
    """The BatchNorm that a layer is, without what its type adds: in another object, with the same parameters, buffers, mode and options."""
    alone = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    alone.__dict__.update(norm.__dict__, _compiled_call_impl=None)
    return alone


def make_plan(match: Match, block: nn.Module) -> Plan:
    """The plan for a matched block. Raises NoFit where hooks, types or shapes stand in the way."""
    peer = match.peer
    if "forward" in block.__dict__:
        raise NoFit("it has a forward of its own")
    layers = set(peer.layers.values())
    inner = []
    for path, module in bypassed(peer, block):
        if any(path.startswith(f"{layer}.") for layer in layers):
            continue  # what a parametrization added, or what a norm of timm's carries
        kind = plain_type(module)
        kinds = NORMS if kind in NORMS else (kind,)
        problem = obstacle(module, kinds)
        if problem is not None:
            raise NoFit(f"{path} {problem}")
        inner.append(Inner(tuple(path.split(".")), kinds, None if path in layers else tuple(module._modules)))
    module_type: Any = getattr(blocks, peer.module)
    model = module_type(**match.options, device="meta")
    for ours, theirs in peer.layers.items():
        _check_shapes(theirs, sublayer(block, theirs), sublayer(model, ours))
    paths = tuple(peer.layers.get(name) for name in model.layers)
    return Plan(module_type, paths, model.settings(), model.residual, peer.inputs, match.input_dims, peer.square, tuple(inner), peer.before)


def _check_shapes(path: str, theirs: Any, ours: Any) -> None:
    for name in ("data",) if isinstance(ours, Tensor) else ("weight", "bias"):
        shapes = [None if (t := getattr(layer, name, None)) is None else squeezed(t.shape) for layer in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise NoFit(f"{path}.{name} has shape {shapes[0]}, expected {shapes[1]}")


class Fused(Derived):
    """A converted block."""

    _tritattn: Plan | None = None  # a slice of a Sequential has its type and no plan

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self._tritattn
        if plan is not None and not kwargs and plan.covers(self, *args):  # type: ignore[arg-type]
            return plan.run(self, *args)  # type: ignore[arg-type]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def install(block: nn.Module, plan: Plan) -> None:
    block.__dict__["_tritattn"] = plan
    original: Any = type(block)
    block.__class__ = derived_type(Fused, original)


def uninstall(block: Any) -> bool:
    """Undoes `install`; False where the block's class has been changed since."""
    original = original_type(type(block))
    if type(block) is not derived_type(Fused, original):
        return False
    block.__class__ = original
    block.__dict__.pop("_tritattn", None)
    return True
