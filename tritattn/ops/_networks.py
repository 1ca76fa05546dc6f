"""Small networks that the caller brings: modules or functions that an op calls between its passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]
Networks = Network | Sequence[Network]


def each(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else (value,)


def network(name: str, value: Any, optional: bool = False) -> None:
    """The check of such an argument: one network, or several in a row."""
    if optional and value is None:
        return
    for net in each(value):
        if not callable(net):
            raise TypeError(f"{name}: got {type(net).__name__}, expected a module or a function")


def hooked(net: nn.Module) -> bool:
    """Whether a call of the module does more than its type says."""
    return bool(net._forward_hooks or net._forward_pre_hooks or net._backward_hooks or net._backward_pre_hooks or "forward" in net.__dict__)


def dtype_for(net: Network, z: Tensor) -> torch.dtype:
    """In which a network gets z: that of its parameters, but autocast sees to that itself, where it can."""
    first = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    own = first is None or (torch._C._is_any_autocast_enabled() and z.dtype != torch.float64)
    return z.dtype if own else first.dtype  # type: ignore[union-attr]


def called(name: str, nets: Networks, z: Tensor, shape: Sequence[int | None]) -> Tensor:
    """What the networks make of z, each called in the dtype of its parameters; `shape`: of the result, None where any size will do."""
    for net in each(nets):
        z = net(z.to(dtype_for(net, z)))
    if z.dim() != len(shape) or any(size is not None and found != size for found, size in zip(z.shape, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: got a network that returns shape {list(z.shape)}, expected [{expected}]")
    return z
