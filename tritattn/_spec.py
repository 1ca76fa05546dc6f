"""The options of a call, as one value: a NamedTuple in Python, a short string in the schema of a registered op.

One string keeps schemas short; a long one costs microseconds per call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Spec(NamedTuple):
    pools: str = "avg"  # channel statistics, joined by "+"
    kind: str = "none"  # excite: none, mlp, fc, conv, circular
    hidden: str = "none"  # activation between the two layers of mlp
    gate: str = "sigmoid"  # of the channel logits
    spatial_gate: str = "sigmoid"  # of the spatial logits
    order: str = "none"  # spatial statistics: mean_max, max_mean, mix, or none
    combine: str = "none"  # of channel and spatial gates: sum, max, product
    max_grad: str = "first"
    activation: str = "none"
    eps: str = ""  # of a BatchNorm folded into the spatial convolution
    out: str = ""  # dtype of the spatial logits, where not the accumulator's

    def encode(self) -> str:
        return ",".join(self)


@lru_cache(maxsize=4096)
def decode(text: str) -> Spec:
    return Spec(*text.split(","))
