"""Gather-excite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from eager_blocks import local_gate
from torch import Tensor, nn

from tritattn import ops

from .op import Op, Params, Shape, mlp

RELAY = ("local_squeeze", "local_gate")


def _ge(
    name: str, extent: int | None, shapes: Callable[[Shape], dict[str, Any]] = lambda s: {}, families: tuple[str, ...] = RELAY, main: bool = False,
    refused: Callable[[Shape], bool] = lambda s: False, **options: Any,
) -> Op:  # fmt: skip
    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        tensors = (p.get(n) for n in ("w1", "b1", "w2", "b2"))
        return ops.ge(x, *tensors, gather=p.get("gather"), extent=extent, **options, **epilogue)

    return Op(name, shapes, call, lambda x, p: x * local_gate(x, p, extent, **options), ("w1",), families, main=main, refused=refused)


def _depthwise(s: Shape) -> dict[str, Any]:
    c = s[1]
    return {"gather": lambda: nn.Sequential(nn.Conv2d(c, c, 3, 2, 1, groups=c, bias=False), nn.BatchNorm2d(c, momentum=0.3))}


def _padded(s: Shape) -> dict[str, Any]:
    """A kernel of even sizes, which leaves a row and a column less than there are."""
    size = tuple(n // 2 * 2 or 1 for n in s[2:])
    return {"gather": lambda: nn.Conv2d(s[1], s[1], size, padding=tuple((n - 1) // 2 for n in size), groups=s[1], bias=False)}


OPS = [
    _ge("ge", 2, main=True),
    _ge("ge-mlp", 4, mlp(conv=True), main=True, hidden="silu", gate="hard_sigmoid"),
    _ge("ge-global", 0, families=("channel_relay", "channel_relay_gate")),
    _ge("ge-gather", 2, _depthwise, refused=lambda s: s[0] * math.prod(-(-size // 2) for size in s[2:]) <= 1),
    _ge("ge-whole", None, _padded),
]  # fmt: skip
