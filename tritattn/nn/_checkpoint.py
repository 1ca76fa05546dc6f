"""Loading the state dicts of other packages' blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._match import squeezed
from ..peers import PEERS, Peer


def translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Renames and reshapes, in place, the entries under `prefix` of another package's state dict into those of `module`.

    A key that has no place in `module` keeps its name, so that torch reports it as unexpected. Shapes that do not fit are put into `errors`
    under both names, and so is an order of the spatial statistics that the weights were not trained for. A state dict of the module's own
    is left alone, but for weights that are linear there and 1x1 convolutions here.
    """
    own = {name: t.shape for name, t in module.state_dict().items()}
    given = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
    sources, renamed = _best(module, own, given)
    state_dict.update({prefix + new: state_dict.pop(prefix + old) for old, new in renamed.items()})
    for name, shape in own.items():
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.shape != shape and squeezed(tensor.shape) == squeezed(shape):
            state_dict[prefix + name] = tensor.reshape(shape)
    names = " or ".join(map(str, sources))
    for old, new in renamed.items():
        shape = state_dict[prefix + new].shape
        if shape != own[new]:
            errors.append(f"{prefix}{old} of {names} has shape {list(shape)}, which does not fit {prefix}{new} {list(own[new])}")
    order = getattr(module, "order", getattr(getattr(module, "spatial", None), "order", None))
    orders = [peer.options.get("order", order) for peer in sources]
    if orders and order not in orders:
        errors.append(f"{prefix or 'order'}: the weights of {names} are for order={orders[0]!r}, the module has order={order!r}")


def _best(module: nn.Module, own: Mapping[str, Any], given: Sequence[str]) -> tuple[list[Peer], dict[str, str]]:
    """The entries that explain most of the keys, where some are not the module's own, and what they are called in the module."""
    sources: list[Peer] = []
    best: dict[str, str] = {}
    if own.keys() >= set(given):
        return sources, best
    kinds = [kind.__name__ for kind in type(module).__mro__]
    for peer in PEERS:
        renamed = {old: new for old, new in _renamed(peer, given).items() if new in own and peer.module in kinds}
        if renamed and renamed == best:
            sources.append(peer)
        elif len(renamed) > len(best):
            sources, best = [peer], renamed
    return sources, best


def _renamed(peer: Peer, given: Sequence[str]) -> dict[str, str]:
    """Keys of the block -> keys of the module."""
    layers = peer.layers.items()
    return {key: ours + key[len(theirs) :] for key in given for ours, theirs in layers if key.startswith(f"{theirs}.")}
