"""Small networks that the caller brings: modules or functions that an op calls between its passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]
Networks = Network | Sequence[Network]


def _each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else (value,)


def network(name: str, value: Any, optional: bool = False) -> None:
    """The check of such an argument: one network, or several in a row."""
    if optional and value is None:
        return
    for net in _each(value):
        if not callable(net):
            raise TypeError(f"{name}: got {type(net).__name__}, expected a module or a function")


def called(name: str, nets: Networks, z: Tensor, shape: Sequence[int | None]) -> Tensor:
    """What the networks make of z, each called in the dtype of its parameters; `shape`: of the result, None where any size will do."""
    for net in _each(nets):
        first = next(net.parameters(), None) if isinstance(net, nn.Module) else None
        z = net(z if first is None else z.to(first.dtype))
    if z.dim() != len(shape) or any(size is not None and found != size for found, size in zip(z.shape, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: got a network that returns shape {list(z.shape)}, expected [{expected}]")
    return z
