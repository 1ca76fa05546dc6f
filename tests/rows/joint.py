"""BAM."""

from __future__ import annotations

import math
from typing import Any

from eager_blocks import GATES
from torch import Tensor, nn

from tritattn import ops

from .op import Op, Params, Shape


def _channel(c: int) -> nn.Module:
    return nn.Sequential(nn.Linear(c, c // 2 + 1), nn.SiLU(), nn.Linear(c // 2 + 1, c))


def _spatial(c: int, norm: bool) -> nn.Module:
    middle = nn.BatchNorm2d(c // 2 + 1) if norm else nn.SiLU()
    return nn.Sequential(nn.Conv2d(c, c // 2 + 1, 1, bias=not norm), middle, nn.Conv2d(c // 2 + 1, 1, 3, padding=2, dilation=2))


def _bam(name: str, combine: str, gate: str = "sigmoid", norm: bool = False, main: bool = False) -> Op:
    def shapes(s: Shape) -> dict[str, Any]:
        return {"channel": lambda: _channel(s[1]), "spatial": lambda: _spatial(s[1], norm)}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.bam(x, p["channel"], p["spatial"], combine=combine, gate=gate, **epilogue)

    def eager(x: Tensor, p: Params) -> Tensor:
        c, s = p["channel"](x.mean((2, 3)))[..., None, None], p["spatial"](x)
        return (1 + GATES[gate](c * s if combine == "product" else c + s)) * x

    def refused(s: Shape) -> bool:
        return norm and s[0] * math.prod(s[2:]) <= 1

    return Op(name, shapes, call, eager, (), ("channel_relay", "spatial_gate"), main=main, refused=refused)


OPS = [
    _bam("bam", "product", main=True),
    _bam("bam-sum", "sum", "hard_sigmoid", norm=True),
]
