"""MS-CAM, AFF, iAFF, and the blend of two maps."""

from __future__ import annotations

from typing import Any

from eager_blocks import GATES
from torch import Tensor, nn

from tritattn import ops

from .op import Op, Params, Shape

BETWEEN = ("fusion_squeeze", "fusion_gate")


def _context(c: int, norm: bool) -> nn.Module:
    """With BatchNorms in eval: in training one of few values divides their differences by themselves."""
    r = c // 2 + 1
    layers = [nn.Conv2d(c, r, 1), nn.BatchNorm2d(r), nn.SiLU(), nn.Conv2d(r, c, 1), nn.BatchNorm2d(c)]
    return nn.Sequential(*(layer for layer in layers if norm or not isinstance(layer, nn.BatchNorm2d))).eval()


def _contexts(s: Shape, norm: bool, rounds: int = 1) -> dict[str, Any]:
    names = ("local", "pooled", "local2", "pooled2")[: 2 * rounds]
    return {name: lambda: _context(s[1], norm) for name in names}


def weights(u: Tensor, local: nn.Module, pooled: nn.Module, gate: str = "sigmoid") -> Tensor:
    return GATES[gate](local(u) + pooled(u.mean((2, 3), keepdim=True)))


def _mscam(name: str, norm: bool, gate: str = "sigmoid", main: bool = False) -> Op:
    return Op(
        name,
        lambda s: _contexts(s, norm),
        lambda x, p, **epilogue: ops.mscam(x, p["local"], p["pooled"], gate=gate, **epilogue),
        lambda x, p: x * weights(x, p["local"], p["pooled"], gate),
        (),
        BETWEEN,
        main=main,
    )


def _aff(name: str, norm: bool, factor: int, gate: str = "sigmoid", main: bool = False) -> Op:
    def eager(x: Tensor, p: Params) -> Tensor:
        w = weights(x + p["x1"], p["local"], p["pooled"], gate)
        return factor * x * w + factor * p["x1"] * (1 - w)

    return Op(
        name,
        lambda s: {"x1": s, **_contexts(s, norm)},
        lambda x, p, **epilogue: ops.aff(x, p["x1"], p["local"], p["pooled"], factor=factor, gate=gate, **epilogue),
        eager,
        (),
        BETWEEN,
        main=main,
    )


def _iaff(name: str, reuse: bool = False) -> Op:
    def second(p: Params) -> nn.Module:
        return p["pooled" if reuse else "pooled2"]

    def eager(x: Tensor, p: Params) -> Tensor:
        w = weights(x + p["x1"], p["local"], p["pooled"])
        w = weights(x * w + p["x1"] * (1 - w), p["local2"], second(p))
        return x * w + p["x1"] * (1 - w)

    def shapes(s: Shape) -> dict[str, Any]:
        made = {"x1": s, **_contexts(s, True, 2)}
        return {name: value for name, value in made.items() if not (reuse and name == "pooled2")}

    def call(x: Tensor, p: Params, **epilogue: Any) -> Tensor:
        return ops.iaff(x, p["x1"], p["local"], p["pooled"], p["local2"], second(p), **epilogue)

    return Op(name, shapes, call, eager, (), (*BETWEEN, "blend"))


def _blend(name: str, pooled: bool, gate: str, factor: int, main: bool = False) -> Op:
    def eager(x: Tensor, p: Params) -> Tensor:
        w = GATES[gate](p["local"] if p["pooled"] is None else p["local"] + p["pooled"])
        return factor * x * w + factor * p["x1"] * (1 - w)

    return Op(
        name,
        lambda s: {"x1": s, "local": s, "pooled": (*s[:2], 1, 1) if pooled else None},
        lambda x, p, **epilogue: ops.blend(x, p["x1"], p["local"], p["pooled"], gate=gate, factor=factor, **epilogue),
        eager,
        (),
        ("blend",),
        main=main,
    )


OPS = [
    _mscam("mscam", True, main=True),
    _mscam("mscam-hard", False, "hard_sigmoid"),
    _aff("aff", True, 2, main=True),
    _aff("aff-paper", False, 1, "hard_sigmoid"),
    _iaff("iaff"),
    _iaff("iaff-reuse", reuse=True),
    _blend("blend", True, "sigmoid", 1, main=True),
    _blend("blend-map", False, "relu", 2),
]
