"""The options of a call, as one value: a NamedTuple in Python, a short string in the schema of a registered op.

One string keeps schemas short; a long one costs microseconds per call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, get_type_hints


class Spec(NamedTuple):
    """The options of the squeeze-excite-gate families; a family with others brings a NamedTuple of str, int and bool fields of its own, `activation`
    among them where it has an epilogue."""

    pools: str = "avg"  # channel statistics, joined by "+"
    kind: str = "none"  # excite: none, mlp, fc, conv, circular
    hidden: str = "none"  # activation between the two layers of mlp
    gate: str = "sigmoid"  # of the channel logits
    spatial_gate: str = "sigmoid"  # of the spatial logits
    order: str = "none"  # spatial statistics: mean_max, max_mean, mix, or none
    combine: str = "none"  # of channel and spatial gates: sum, max, product
    max_grad: str = "first"
    activation: str = "none"
    eps: str = ""  # of a BatchNorm that is part of a pass
    out: str = ""  # dtype of the spatial logits, where not the accumulator's
    joint: str = ""  # f of a factor 1 + f(channel and spatial logits combined), whose own gates are none
    before: str = "none"  # activation of the map that the channel gates take


_READ: dict[type, Callable[[str], Any]] = {str: str, int: int, bool: lambda text: text == "True"}


def encode(spec: Any) -> str:
    return ",".join(map(str, spec))


@lru_cache(maxsize=4096)
def decode(kind: type, text: str) -> Any:
    """The value of that NamedTuple class that `encode` wrote."""
    return kind(*(_READ[hint](part) for hint, part in zip(_hints(kind), text.split(","), strict=True)))


@lru_cache(maxsize=64)
def _hints(kind: type) -> tuple[type, ...]:
    return tuple(get_type_hints(kind).values())
