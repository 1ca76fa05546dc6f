"""Residual blocks around converted attention, which takes their sum and activation into its gating pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ._fused import NORMS, Fused, Inner, Plan
from ._match import activation_name, plain_type
from .nn._base import ChannelGate, obstacle
from .nn._derived import original_type
from .peers import HIDDEN, NoFit, Residual, residuals
from .reference import ACTIVATIONS

LAST = {name: function for name, function in HIDDEN.items() if function in ACTIVATIONS}
RANDOM = frozenset({"DropPath", "StochasticDepth"})  # class names of modules that do nothing in evaluation


def find(block: nn.Module) -> Residual | None:
    """The entry that has the block's attention where it is and has been converted."""
    return next((entry for entry in residuals(block) if isinstance(getattr(block, entry.attention, None), Fused)), None)


def make_residual_plan(entry: Residual, block: nn.Module) -> Plan:
    """The plan of the block: that of its attention with the sum and the activation. Raises NoFit where something else stands between."""
    if "forward" in block.__dict__:
        raise NoFit("it has a forward of its own")
    attention: Any = getattr(block, entry.attention)
    plan: Plan = attention._tritattn
    if plan.before is not None or plan.residual or plan.inputs > 1 or plan.square:
        raise NoFit(f"{entry.attention} does more than to gate a map")
    called = entry.branch.called(entry.activation)
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
    *steps, last = entry.branch.steps
    preceded = issubclass(plan.module, ChannelGate) and type(getattr(block, last)) in NORMS
    activation = activation_name(LAST, entry.activation, dict(block._modules))
    return replace(
        plan,
        layers=tuple(path and f"{entry.attention}.{path}" for path in plan.layers),
        settings=plan.settings | {"activation": activation},
        inner=tuple(inner),
        before=replace(entry.branch, steps=tuple(steps)) if preceded else entry.branch,
        children=tuple(block._modules),
        norm=last if preceded else None,
    )
