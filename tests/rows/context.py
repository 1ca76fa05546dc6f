"""Global context."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from eager_blocks import GATES
from torch import Tensor, nn

from tritattn import ops

from .op import Op, Params, Shape


def _network(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c // 2 + 1, 1), nn.SiLU(), nn.Conv2d(c // 2 + 1, c, 1))


def _eager(x: Tensor, p: Params, gate: str = "sigmoid") -> Tensor:
    if p["w"] is None:
        context = F.adaptive_avg_pool2d(x, 1)
    else:
        a = F.softmax(F.conv2d(x, p["w"].reshape(1, -1, 1, 1), p["b"]).flatten(2), -1)
        context = torch.einsum("nkp,ncp->nc", a, x.flatten(2))[..., None, None]
    y = x if p["scale"] is None else x * GATES[gate](p["scale"](context))
    return y if p["add"] is None else y + p["add"](context)


def _gc(name: str, add: bool, scale: bool, attention: bool = True, bias: bool = True, main: bool = False, **options: Any) -> Op:
    def shapes(s: Shape) -> dict[str, Any]:
        c = s[1]
        made = {"add": (lambda: _network(c)) if add else None, "scale": (lambda: _network(c)) if scale else None}
        return {"w": (1, c, 1, 1) if attention else None, "b": (1,) if attention and bias else None, **made}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.gc(x, p["w"], p["b"], add=p["add"], scale=p["scale"], **options, **epilogue)

    return Op(name, shapes, call, lambda x, p: _eager(x, p, **options), ("w",), ("context_squeeze", "context_gate"), main=main)


OPS = [
    _gc("gc", True, False, main=True),
    _gc("gc-both", True, True, bias=False),
    _gc("gc-avg", False, True, False, gate="hard_sigmoid"),
]
