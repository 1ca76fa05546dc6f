"""How the registered ops act on DTensors."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._library import Family


@lru_cache(maxsize=1)
def register(families: tuple[Family, ...]) -> None:
    """Everything replicated, or the batch sharded: then parameters stay replicated and their gradients are partial sums."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    for family in families:
        results = len(family.outputs)

        def forward_rule(*args: Any, family: Family = family, results: int = results) -> list[Any]:
            tensors = args[:-1]
            batch = [
                None if t is None else Shard(0) if name in family.batched else Replicate()
                for name, t in zip(family.inputs, tensors, strict=True)
            ]
            whole = [None if t is None else Replicate() for t in tensors]
            return [([Replicate()] * results, [*whole, None]), ([Shard(0)] * results, [*batch, None])]

        def backward_rule(*args: Any, family: Family = family) -> list[Any]:
            *tensors, _, needs = args
            grads, inputs, saved = family._split(tensors)
            whole = [None if t is None else Replicate() for t in tensors]
            batch: list[Any] = [None if g is None else Shard(0) for g in grads]
            batch += [
                None if t is None else Shard(0) if name in family.batched else Replicate()
                for name, t in zip(family.inputs, inputs, strict=True)
            ]
            batch += [Shard(0) for _ in saved]
            found = [
                Replicate() if not need else Shard(0) if name in family.batched else Partial()
                for name, need in zip(family.inputs, needs, strict=True)
            ]
            return [([Replicate()] * len(inputs), [*whole, None, None]), (found, [*batch, None, None])]

        register_sharding(family.op)(forward_rule)
        register_sharding(family.op_backward)(backward_rule)
