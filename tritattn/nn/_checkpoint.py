"""Loading the state dicts of other packages' blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._match import squeezed
from ..peers import PEERS, Peer

def translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, strict: bool, errors: list[str]) -> None:
    """Renames and reshapes, in place, the entries under `prefix` of another package's state dict into those of `module`.

    Says in `errors` what does not fit, in the other package's names. Leaves a state dict of the module's own alone, but for layers that
    are linear there and 1x1 convolutions here.
    """
    own = {name: t.shape for name, t in module.state_dict().items()}
    given = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
    peer, renamed = None, {}
    if not given.keys() <= own.keys():
        names = [kind.__name__ for kind in type(module).__mro__]
        for entry in PEERS:
            if entry.module in names and len(found := _renamed(entry, given)) > len(renamed):
                peer, renamed = entry, found
    moved = {prefix + new: state_dict.pop(prefix + old) for old, new in renamed.items()}
    state_dict.update(moved)
    for name, shape in own.items():
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.shape != shape and squeezed(tensor.shape) == squeezed(shape):
            state_dict[prefix + name] = tensor.reshape(shape)
    if peer is None:
        return
    problems = [f"{old} has no place" for old in given if old not in renamed]
    problems += [f"{name} is missing" for name in own if prefix + name not in state_dict and not name.endswith("num_batches_tracked")]
    for old, new in renamed.items():
        shape = getattr(state_dict[prefix + new], "shape", None)
        if new in own and shape != own[new]:
            problems.append(f"{old} {list(shape or ())} does not fit {new} {list(own[new])}")
        elif new not in own:
            problems.append(f"{old} has no place: there is no {new}")
    expected = getattr(module, "order", getattr(getattr(module, "spatial", None), "order", None))
    if expected is not None and peer.options.get("order", expected) != expected:
        errors.append(f"{prefix or 'the module'}: a checkpoint of {peer} needs order={peer.options['order']!r}, got order={expected!r}")
    if problems and strict:
        errors.append(f"{prefix or 'the module'}: these are keys of {peer}, but with the options given here {'; '.join(problems)}")


def _renamed(peer: Peer, given: Mapping[str, str]) -> dict[str, str]:
    """Keys of the block -> keys of the module."""
    return {
        key: ours + key[len(theirs) :]
        for key in given
        for ours, theirs in peer.layers.items()
        if key.startswith(f"{theirs}.")
    }
