"""Reading a block as an entry of the table: is it the one, and with which options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .peers import GATES, HIDDEN, NoFit, Peer

# Types of inner modules that a fused pass replaces without looking at them: pooling to one element and reshaping.
PASSIVE = frozenset(
    {"AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AdaptiveMaxPool2d", "Flatten", "Identity", "ModuleList", "Sequential"}
)
# Layers that are no more than their weight and bias. Types and not names: quantisation and adapters have a Conv2d of their own.
PLAIN_LAYERS = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm})
# timm's norms, which the ops call as modules.
CALLED_NORMS = ("BatchNormAct2d", "GroupNorm1")


class Absent(NoFit):
    """The block has not the entry's layers: its class only happens to have the same name."""


@dataclass(frozen=True)
class Match:
    """A block recognised as an entry, and the constructor options with which the entry's module computes the same."""

    peer: Peer
    options: dict[str, Any]
    input_channels: int
    input_dims: int


def match(peer: Peer, block: nn.Module, sizes: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Match:
    """The block read as that entry. sizes: `options_of` of the entry's module. Raises NoFit with the reason."""
    modules: dict[str | None, Any] = {**dict(block.named_modules(remove_duplicate=False)), **dict(block.named_parameters())}
    for path in (*peer.layers.values(), *peer.called[:1]):
        if path not in modules:
            raise Absent(f"it has no layer {path}")
    chosen = peer.read(block)
    for path, module in bypassed(peer, block):
        _check_inner(peer, path, module)
    layers = {ours: modules[theirs] for ours, theirs in peer.layers.items()}
    options = {**sizes(layers), **_activations(peer, modules), **peer.options, **chosen}
    first = modules[peer.called[0]] if peer.called else None
    channels = getattr(block, "in_channels", getattr(first, "in_channels", options.get("channels", 16)))
    pools = [name for m in modules.values() if (name := type(m).__name__).startswith("AdaptiveAvgPool")]
    return Match(peer, options, channels, 2 + int(pools[0][-2]) if pools else 4)


def bypassed(peer: Peer, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every inner module that the fused pass replaces."""
    for path, module in block.named_modules(remove_duplicate=False):
        if path and not any(path == called or path.startswith(f"{called}.") for called in peer.called):
            yield path, module


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The type without what torch's parametrizations add to it."""
    return type(module).__mro__[1] if is_parametrized(module) else type(module)


def _check_inner(peer: Peer, path: str, module: nn.Module) -> None:
    name = plain_type(module).__name__
    if path in peer.layers.values():
        if plain_type(module) not in PLAIN_LAYERS and name not in CALLED_NORMS:
            raise NoFit(f"{path} is a {name}, not a plain layer")
    elif any(path.startswith(f"{layer}.parametrizations") for layer in peer.layers.values()):
        pass
    elif any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        raise NoFit(f"it has a layer that {peer} has not: {path}, a {name}")
    elif name not in PASSIVE and name not in HIDDEN and name not in GATES and name not in peer.inner:
        raise NoFit(f"{path} is of an unknown type, {name}")


def _activations(peer: Peer, modules: Mapping[str | None, nn.Module]) -> dict[str, Any]:
    """The activations that the block's modules stand for; a path without a module is a function call, taken for the entry's usual one."""
    options = {}
    if peer.hidden in modules:
        options["act"] = activation_name(HIDDEN, peer.hidden, modules)
    gates = {activation_name(GATES, path, modules) for path in peer.gates if path in modules}
    if len(gates) > 1:
        raise NoFit(f"its gates differ: {', '.join(sorted(gates))}")
    if gates:
        options["gate"] = gates.pop()
    if peer.spatial_gate in modules:
        options["spatial_gate"] = activation_name(GATES, peer.spatial_gate, modules)
    return options


def activation_name(names: Mapping[str, str], path: Any, modules: Mapping[Any, Any]) -> str:
    module = modules[path]
    kind = type(module).__name__
    plain = getattr(module, "negative_slope", 0.01) == 0.01 and getattr(module, "approximate", "none") == "none"
    if kind not in names or not plain:
        raise NoFit(f"{path} is {module}, which is not fused")
    return names[kind]


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape without trailing ones, by which 1x1 convolutions and linear layers differ, and norms over one position; of one dimension at
    least."""
    shape = tuple(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
